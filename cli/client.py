"""What `generate` and `chat` share: where the gateway is, sampling flags as a message, errors as text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from pydantic import SecretStr
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from shared.auth import send_key
from shared.config import load_config
from shared.rpc import RpcError, connect, from_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}


@dataclass(frozen=True)
class Target:
    """A gateway. address: host:port, None = the configured one. timeout_s: deadline of each request."""

    address: str | None = None
    api_key: str | None = None
    timeout_s: float | None = None

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
        """A stub on a channel that closes with the context; failures of its calls leave as RpcError."""
        address = self.address or _configured_address()
        key = SecretStr(self.api_key) if self.api_key else None
        async with connect(address, interceptors=send_key(key)) as channel:
            try:
                yield inference_pb2_grpc.InferenceServiceStub(channel)
            except grpc.aio.AioRpcError as error:
                raise explain(from_grpc(error), address) from None


@dataclass(frozen=True)
class Sampling:
    """Sampling flags; None = not given, the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    stop: Sequence[str] = field(default=())

    def message(self) -> types_pb2.SamplingParams:
        """With the given flags set."""
        return types_pb2.SamplingParams(**{name: value for name, value in vars(self).items() if value is not None})


class Stopwatch:
    """Counts the tokens of a stream and when they came."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self._first_tokens = self._tokens = 0

    def take(self, chunk: inference_pb2.GenerateResponse) -> None:
        """Call it when the chunk arrives."""
        new = sum(len(output.token_ids) for output in chunk.outputs)
        if not new:
            return
        self._last = time.perf_counter()
        if not self._tokens:
            self._first, self._first_tokens = self._last, new
        self._tokens += new

    def summary(self) -> str:
        """Such as `32 tokens, the first after 41 ms, then 58.3 tokens/s`."""
        if not self._tokens:
            return "no tokens"
        text = f"{self._tokens} tokens, the first after {(self._first - self._start) * 1000:.0f} ms"
        if (seconds := self._last - self._first) > 0:
            text += f", then {(self._tokens - self._first_tokens) / seconds:.1f} tokens/s"
        return text


def reachable(address: str) -> str:
    """An address that listens everywhere, as a client on this host would call it."""
    host, _, port = address.rpartition(":")
    return f"{_EVERY_ADDRESS.get(host, host)}:{port}"


def explain(error: RpcError, address: str) -> RpcError:
    """The error with a hint, where nothing answers at the address."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.details:
        return RpcError(error.code, f"no answer at {address}: {error.message}\nIs it running? `./tandem up` starts it.")
    return error


def _configured_address() -> str:
    gateway = load_config().gateway
    return reachable(f"{gateway.host}:{gateway.port}")
