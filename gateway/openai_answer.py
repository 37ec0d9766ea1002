"""One answer of the OpenAI API, whole or as server-sent events, from the streams of its requests."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from tandem.v1 import inference_pb2

from gateway.merged_stream import MergedStream
from gateway.openai_reply import Envelope, Format, Json, Totals, merge_outputs

DONE = b"data: [DONE]\n\n"
Batch = list[tuple[int, inference_pb2.GenerateResponse]]


class Answer:
    """Turns replies into an answer's choices: output j of prompt i is choice i * num_outputs + j.

    prefixes: what each choice of a prompt begins with, its prompt if that is echoed, else "".
    """

    def __init__(self, style: Format, envelope: Envelope, num_outputs: int, prefixes: Sequence[str]) -> None:
        self._style = style
        self._envelope = envelope
        self._num_outputs = num_outputs
        self._prefixes = prefixes
        self._totals = Totals(len(prefixes))
        self._offsets: dict[int, int] = {}  # choice to characters of its tokens so far

    async def whole(self, first: Batch, merged: MergedStream) -> Json:
        """The answer in one piece, when all has come; `first` is what was ready already."""
        chunks: dict[int, list[inference_pb2.Output]] = {
            choice: [] for choice in range(len(self._prefixes) * self._num_outputs)
        }
        batch = first
        while batch:
            for prompt, reply in batch:
                self._totals.add(prompt, reply)
                for output in reply.outputs:
                    chunks[self._choice(prompt, output)].append(output)
            batch = await merged.ready()
        choices = [
            self._style.whole(merge_outputs(outputs), choice, self._prefixes[choice // self._num_outputs])
            for choice, outputs in chunks.items()
        ]
        return self._envelope.wrap(self._style.whole_object, choices) | self._totals.to_json()

    async def events(self, first: Batch, merged: MergedStream, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The answer as events; all that is ready goes out in one piece of bytes.

        include_usage: the last chunk has no choices but usage and receipts (OpenAI's stream_options).
        """
        batch = first
        while batch:
            events = [
                self._chunk(prompt, output, include_usage)
                for prompt, reply in batch
                for output in reply.outputs
                # nothing to say yet: a token that begins a character, or that may begin a stop string
                if output.text or output.logprobs or output.finish_reason
            ]
            for prompt, reply in batch:
                self._totals.add(prompt, reply)
            if events:
                yield b"".join(events)
            batch = await merged.ready()
        if include_usage:
            yield event(self._envelope.wrap(self._style.chunk_object, []) | self._totals.to_json()) + DONE
        else:
            yield DONE

    def _chunk(self, prompt: int, output: inference_pb2.Output, include_usage: bool) -> bytes:
        choice = self._choice(prompt, output)
        first, offset = choice not in self._offsets, self._offsets.get(choice, 0)
        self._offsets[choice] = offset + sum(len(position.chosen.text) for position in output.logprobs)
        chunk = self._envelope.wrap(
            self._style.chunk_object, [self._style.chunk(output, choice, self._prefixes[prompt], offset, first)]
        )
        return event(chunk | {"usage": None} if include_usage else chunk)

    def _choice(self, prompt: int, output: inference_pb2.Output) -> int:
        return prompt * self._num_outputs + output.index


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def dump(value: Any) -> bytes:
    """JSON without spaces, text as UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
