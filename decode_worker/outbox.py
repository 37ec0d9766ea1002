"""What a stream has still to send: tokens that the client is too slow for gather in one message."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from tandem.v1 import decode_pb2

from decode_worker.group import NewTokens
from shared.rpc import RpcError
from shared.token_reply import FINISH_REASONS, position_logprobs, sampled_logprobs


class Outbox:
    """Messages in order, until an end or an error. One event loop; one reader."""

    def __init__(self) -> None:
        self._messages: deque[decode_pb2.DecodeResponse] = deque()
        self._open: decode_pb2.DecodeResponse | None = None  # the last message, if more tokens can go into it
        self._outputs: dict[int, decode_pb2.OutputTokens] = {}  # of the open message, by output index
        self._error: RpcError | None = None
        self.ended = False  # nothing follows what is here
        self._wake = asyncio.Event()

    def put(self, message: decode_pb2.DecodeResponse) -> None:
        self._close()
        self._messages.append(message)
        self._wake.set()

    def put_tokens(self, event: NewTokens) -> None:
        """Adds tokens to the message that waits, if there is one."""
        if self._open is None:
            self._open = decode_pb2.DecodeResponse(tokens=decode_pb2.Tokens(attempt=event.attempt))
            self._messages.append(self._open)
        tokens = self._open.tokens
        tokens.cached_tokens = event.cached_tokens
        tokens.preemptions = event.preemptions
        tokens.prompt_logprobs.extend(position_logprobs(report) for report in event.prompt_logprobs)
        for token in event.tokens:
            output = self._outputs.get(token.index)
            if output is None:
                output = self._outputs[token.index] = tokens.outputs.add(index=token.index, position=token.position)
            output.finish_reason = FINISH_REASONS[token.finish]
            if token.sampled is not None:
                output.token_ids.append(token.sampled.token_id)
                if (logprobs := sampled_logprobs(token.sampled)) is not None:
                    output.logprobs.append(logprobs)
        self._wake.set()

    def void(self) -> None:
        """Drops what an attempt left behind that is no more."""
        self._close()
        kept = [message for message in self._messages if message.HasField("reserved")]
        self._messages = deque(kept)

    def end(self) -> None:
        """The stream ends once everything is sent."""
        self.ended = True
        self._wake.set()

    def fail(self, error: RpcError) -> None:
        """The stream fails once everything is sent. The first error counts."""
        self._error = self._error or error
        self._wake.set()

    async def messages(self) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """Each message once; ends with the outbox, or raises its error."""
        while True:
            while self._messages:
                message = self._messages.popleft()
                if message is self._open:
                    self._close()
                yield message
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def _close(self) -> None:
        self._open = None
        self._outputs = {}
