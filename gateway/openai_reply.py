"""Answers of the OpenAI API: the objects that outputs of the gateway become.

A choice is an output's place in an answer: prompt 0's n outputs, then prompt 1's, and so on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.message import Message
from tandem.v1 import inference_pb2, types_pb2

from gateway.metrics import transport_name

_FINISH_REASON = {types_pb2.FINISH_REASON_STOP: "stop", types_pb2.FINISH_REASON_LENGTH: "length"}
# JSON has no infinity; OpenAI's own floor
_LEAST_LOGPROB = -9999.0

Json = dict[str, Any]


class Format(Protocol):
    """How one endpoint writes its answers."""

    whole_object: str
    chunk_object: str
    id_prefix: str

    def whole(self, output: inference_pb2.Output, index: int, prefix: str) -> Json:
        """A choice of an answer in one piece; `prefix` is the echoed prompt."""
        ...

    def chunk(self, output: inference_pb2.Output, index: int, prefix: str, offset: int, first: bool) -> Json:
        """A choice of a streamed chunk; `offset` counts the characters of the tokens before, prefix apart."""
        ...


class CompletionFormat:
    """/v1/completions"""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def whole(self, output: inference_pb2.Output, index: int, prefix: str) -> Json:
        return self.chunk(output, index, prefix, offset=0, first=True)

    def chunk(self, output: inference_pb2.Output, index: int, prefix: str, offset: int, first: bool) -> Json:
        return {
            "index": index,
            "text": prefix + output.text if first else output.text,
            "logprobs": self._logprobs(output.logprobs, offset) if output.logprobs else None,
            "finish_reason": _FINISH_REASON.get(output.finish_reason),
        }

    @staticmethod
    def _logprobs(positions: Iterable[types_pb2.PositionLogprobs], offset: int) -> Json:
        tokens, token_logprobs, top_logprobs, text_offset = [], [], [], []
        for position in positions:
            chosen = position.chosen
            tokens.append(chosen.text)
            token_logprobs.append(_logprob(chosen))
            # keyed by text: of two tokens that look alike the likelier one stands, the chosen one always
            top = {token.text: _logprob(token) for token in reversed(position.top)}
            top_logprobs.append(top | {chosen.text: _logprob(chosen)})
            text_offset.append(offset)
            offset += len(chosen.text)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }


class ChatFormat:
    """/v1/chat/completions"""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def whole(self, output: inference_pb2.Output, index: int, prefix: str) -> Json:
        return self._choice(output, index) | {"message": {"role": "assistant", "content": output.text, "refusal": None}}

    def chunk(self, output: inference_pb2.Output, index: int, prefix: str, offset: int, first: bool) -> Json:
        delta: Json = {"role": "assistant"} if first else {}
        if output.text or first:
            delta["content"] = output.text
        return self._choice(output, index) | {"delta": delta}

    @classmethod
    def _choice(cls, output: inference_pb2.Output, index: int) -> Json:
        content = [
            _chat_token(position.chosen) | {"top_logprobs": [_chat_token(token) for token in position.top]}
            for position in output.logprobs
        ]
        return {
            "index": index,
            "logprobs": {"content": content, "refusal": None} if content else None,
            "finish_reason": _FINISH_REASON.get(output.finish_reason),
        }


@dataclass
class Envelope:
    """What all chunks of an answer have in common."""

    id: str
    model: str
    model_digest: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            # OpenAI's word for "the same seed gives the same tokens as long as this is the same"
            "system_fingerprint": f"fp_{self.model_digest[:16]}" if self.model_digest else None,
            "choices": choices,
        }


class Totals:
    """Usage over all prompts of a request, and how each was served."""

    def __init__(self, num_prompts: int) -> None:
        self._usage = types_pb2.Usage()
        self._reports: list[Json] = [{} for _ in range(num_prompts)]

    def add(self, prompt: int, reply: inference_pb2.GenerateResponse) -> None:
        """Takes what a reply tells beside its outputs."""
        report = self._reports[prompt]
        if reply.request_id:
            report["request_id"] = reply.request_id
        if reply.HasField("resolved_sampling"):
            report["sampling"] = _plain(reply.resolved_sampling)
        if reply.HasField("usage"):
            self._usage.prompt_tokens += reply.usage.prompt_tokens
            self._usage.cached_tokens += reply.usage.cached_tokens
            self._usage.completion_tokens += reply.usage.completion_tokens
        if reply.HasField("timings"):
            timings = reply.timings
            report["timings"] = {f.name: getattr(timings, f.name) for f in timings.DESCRIPTOR.fields}
        if reply.HasField("receipt"):
            report["receipt"] = _plain(reply.receipt) | {"transport": transport_name(reply.receipt.transport)}

    def to_json(self) -> Json:
        """`usage` as OpenAI has it, and `tandem`: for each prompt its id, resolved sampling, timings and receipt."""
        usage = self._usage
        return {
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            },
            "tandem": self._reports,
        }


def merge_outputs(chunks: Iterable[inference_pb2.Output]) -> inference_pb2.Output:
    """All chunks of an output as one."""
    merged = inference_pb2.Output()
    texts = []
    for chunk in chunks:
        texts.append(chunk.text)
        merged.MergeFrom(chunk)
    merged.text = "".join(texts)
    merged.position = 0
    return merged


def model_object(model: inference_pb2.Model, created: int) -> Json:
    """A model as /v1/models lists it."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "tandem",
        "max_model_len": model.max_context,
        "family": model.family,
        "dtype": model.dtype,
        "digest": model.digest,
        "chat": model.chat,
    }


def _logprob(token: types_pb2.TokenLogprob) -> float:
    return max(_LEAST_LOGPROB, token.logprob)


def _chat_token(token: types_pb2.TokenLogprob) -> Json:
    # a token that is a part of a character has no text of its own, so its bytes are not known here
    known = "\ufffd" not in token.text
    return {"token": token.text, "logprob": _logprob(token), "bytes": list(token.text.encode()) if known else None}


def _plain(message: Message) -> Json:
    """Set fields by name: numbers stay numbers, where protobuf's own JSON makes strings of 64-bit ones."""
    values: Json = {}
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            values[descriptor.name] = {str(key): item for key, item in value.items()}
        elif descriptor.is_repeated:
            values[descriptor.name] = list(value)
        else:
            values[descriptor.name] = value
    return values
