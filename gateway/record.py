"""What a request has produced so far, written by the request's task and read by any number of client streams.

A reader takes everything there is from its own position on, so that a client that reads slowly gets fewer, larger
chunks, and one that comes back continues where it stopped. What nobody took yet is bounded: `room` makes the request
wait, and with it the worker's stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from tandem.v1 import inference_pb2, types_pb2

from gateway.output import Output
from shared.rpc import RpcError, not_found

# In tokens and reported alternatives together, 20 to 30 bytes each on the wire.
_MAX_CHUNK = 16_384
_MAX_UNREAD = 65_536
_MAX_KEPT = 262_144


class Record:
    """The outputs of one request, and how it ended.

    resolved: the sampling parameters as used. keep: whether what was read is kept for readers that come later.
    """

    def __init__(
        self, request_id: str, outputs: Sequence[Output], resolved: types_pb2.SamplingParams, *, keep: bool
    ) -> None:
        self.request_id = request_id
        self.outputs = outputs
        self.resolved = resolved
        self.prompt_logprobs: Sequence[types_pb2.PositionLogprobs] = ()
        self.error: RpcError | None = None
        self.last: inference_pb2.GenerateResponse | None = None  # usage, timings and receipt once all outputs are done
        self._weight = 1 + (1 + resolved.logprobs if resolved.HasField("logprobs") else 0)
        self._kept_tokens = (_MAX_KEPT // (self._weight * len(outputs))) if keep else 0
        self._read = [0] * len(outputs)  # the furthest that any reader came
        self._readers: set[asyncio.Event] = set()
        self._progress = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self.error is not None or self.last is not None

    def notify(self) -> None:
        """Wakes the readers: tokens were added, or the request ended."""
        for wake in self._readers:
            wake.set()

    def finish(self, last: inference_pb2.GenerateResponse) -> None:
        """All outputs are done; `last` goes with the last chunk."""
        self.last = last
        self.notify()

    def fail(self, error: RpcError) -> None:
        """The request ended without all outputs; readers get what there is, then the error."""
        if not self.ended:
            self.error = error
            self.notify()

    async def room(self) -> None:
        """Waits while the client is so far behind that nothing more should be fetched for it."""
        while self._unread() > _MAX_UNREAD:
            self._progress.clear()
            await self._progress.wait()

    def _unread(self) -> int:
        tokens = sum(len(output.token_ids) - read for output, read in zip(self.outputs, self._read, strict=True))
        return tokens * self._weight

    async def read(
        self, positions: Mapping[int, int] | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The stream from given positions on (output index → position, default 0) to the end of the request.

        Raises the request's error; NOT_FOUND if tokens at a position are not kept any more.
        """
        cursor = [(positions or {}).get(output.index, 0) for output in self.outputs]
        ended = [False] * len(self.outputs)
        first = True
        with_prompt = not any(cursor)
        wake = asyncio.Event()
        self._readers.add(wake)
        try:
            while True:
                wake.clear()
                chunk = self._collect(cursor, ended)
                complete = all(ended) and self.last is not None
                if chunk.outputs or complete:
                    if first:
                        first = False
                        chunk.request_id = self.request_id
                        chunk.resolved_sampling.CopyFrom(self.resolved)
                        if with_prompt:
                            chunk.prompt_logprobs.extend(self.prompt_logprobs)
                    if complete:
                        assert self.last is not None
                        chunk.MergeFrom(self.last)
                    self._advance(cursor)
                    yield chunk
                    if complete:
                        return
                elif self.error is not None:
                    raise self.error
                else:
                    await wake.wait()
        finally:
            self._readers.discard(wake)

    def _collect(self, cursor: list[int], ended: list[bool]) -> inference_pb2.GenerateResponse:
        chunk = inference_pb2.GenerateResponse()
        left = _MAX_CHUNK // self._weight
        for i, output in enumerate(self.outputs):
            count = min(len(output.token_ids) - cursor[i], left)
            if count <= 0 and (not output.done or ended[i] or len(output.token_ids) > cursor[i]):
                continue
            try:
                chunk.outputs.append(output.chunk(cursor[i], count))
            except IndexError as error:
                raise not_found("position", f"{self.request_id}/{cursor[i]}", str(error)) from None
            left -= count
            cursor[i] += count
            ended[i] = output.done and cursor[i] == len(output.token_ids)
        return chunk

    def _advance(self, cursor: Sequence[int]) -> None:
        for i, output in enumerate(self.outputs):
            if cursor[i] > self._read[i]:
                self._read[i] = cursor[i]
                output.forget(cursor[i] - self._kept_tokens)
        self._progress.set()
