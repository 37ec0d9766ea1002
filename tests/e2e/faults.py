"""What the fault tests share: requests for tiny models, streams read step by step, and errors."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest
from tandem.v1 import inference_pb2, types_pb2

from shared.rpc import RpcError, from_grpc
from tests.cluster import Result


def prompt(length: int, seed: int = 1) -> list[int]:
    """Ordinary tokens of the tiny vocabulary, drawn once and for all."""
    rng = random.Random(f"{seed}/{length}")
    return [rng.randrange(3, 384) for _ in range(length)]


def ask(token_ids: list[int] | str, /, request_id: str = "", **sampling: Any) -> inference_pb2.GenerateRequest:
    """A request: greedy, past every end, with logprobs, unless said otherwise."""
    chosen = {"temperature": 0, "ignore_eos": True, "logprobs": 2, **sampling}
    request = inference_pb2.GenerateRequest(request_id=request_id, sampling=types_pb2.SamplingParams(**chosen))
    if isinstance(token_ids, str):
        request.text = token_ids
    else:
        request.token_ids.ids.extend(token_ids)
    return request


class Stream:
    """A running Generate or Resume call, read as far as a test wants.

    received: what has come so far.
    """

    def __init__(self, call: Any, received: Result | None = None) -> None:
        self.call = call
        self.received = received or Result()

    @property
    def positions(self) -> dict[int, int]:
        """Of each output that began, the position of its next token."""
        return {index: len(output.token_ids) for index, output in self.received.outputs.items()}

    async def read(self) -> bool:
        """Takes one message; False at the stream's end."""
        chunk = await self.call.read()
        if chunk is grpc.aio.EOF:
            code = await self.call.code()
            assert code == grpc.StatusCode.OK, f"{code}: {await self.call.details()}"
            return False
        self.received.add(chunk.chunk if isinstance(chunk, inference_pb2.ResumeResponse) else chunk)
        return True

    async def until(self, num_tokens: int) -> None:
        """Reads until some output has so many tokens."""
        while max(self.positions.values(), default=0) < num_tokens:
            assert await self.read(), "the stream ended before"

    async def rest(self) -> Result:
        """Reads to the end: everything received, from the first token on."""
        while await self.read():
            pass
        return self.received


async def failure(call: Any) -> RpcError:
    """The error that a call ends with, unary or streaming."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _end(call)
    return from_grpc(caught.value)


async def _end(call: Any) -> None:
    if hasattr(call, "read"):
        while await call.read() is not grpc.aio.EOF:
            pass
    else:
        await call
