"""Sends one request and times its tokens, over Tandem's gRPC or any OpenAI server's /v1/completions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Protocol, Self

import aiohttp
import grpc
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from benchmarks.workload import Request
from shared.rpc import connect


@dataclass
class Record:
    """What happened to a request; times in seconds."""

    start_s: float = 0.0  # on the clock of time.perf_counter
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)  # over gRPC
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between messages with new tokens
    latency_s: float = 0.0
    cancelled: bool = False
    error: str = ""

    @property
    def completed(self) -> bool:
        return not self.error and not self.cancelled

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Driver(Protocol):
    """Opens with `async with`; `send` never raises for what a server does, it records it."""

    async def send(self, request: Request, *, cancel_after: int | None = None) -> Record: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...


class _Clock:
    """Turns the arrival of messages into a record."""

    def __init__(self) -> None:
        self.record = Record(start_s=time.perf_counter())
        self._last = self.record.start_s

    def tokens(self, number: int) -> None:
        now = time.perf_counter()
        if self.record.output_tokens == 0:
            self.record.ttft_s = now - self.record.start_s
        else:
            self.record.gaps_s.append(now - self._last)
        self._last = now
        self.record.output_tokens += number

    def end(self) -> Record:
        self.record.latency_s = self._last - self.record.start_s
        return self.record


class GrpcDriver:
    """tandem.v1.InferenceService/Generate on one channel."""

    def __init__(self, target: str, model: str = "") -> None:
        self._channel = connect(target)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._model = model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def send(self, request: Request, *, cancel_after: int | None = None) -> Record:
        message = inference_pb2.GenerateRequest(
            model=self._model,
            sampling=types_pb2.SamplingParams(max_tokens=request.output_tokens, temperature=0, ignore_eos=True),
        )
        if request.token_ids is not None:
            message.token_ids.ids.extend(request.token_ids)
        else:
            message.text = request.text or ""
        clock = _Clock()
        call = self._stub.Generate(message)
        try:
            async for chunk in call:
                token_ids = [token_id for output in chunk.outputs for token_id in output.token_ids]
                if token_ids:
                    clock.tokens(len(token_ids))
                    clock.record.token_ids += token_ids
                if chunk.HasField("usage"):
                    clock.record.prompt_tokens = chunk.usage.prompt_tokens
                if cancel_after is not None and clock.record.output_tokens >= cancel_after:
                    clock.record.cancelled = True
                    call.cancel()
                    break
        except grpc.aio.AioRpcError as error:
            clock.record.error = f"{error.code().name}: {error.details()}"
        return clock.end()


class HttpDriver:
    """/v1/completions with stream=true."""

    def __init__(self, url: str, model: str = "") -> None:
        self._url = url.rstrip("/") + "/v1/completions"
        self._model = model

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # a connection for each request: some servers close an idle one without a word
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def send(self, request: Request, *, cancel_after: int | None = None) -> Record:
        body = {
            "prompt": request.text if request.token_ids is None else list(request.token_ids),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._model:
            body["model"] = self._model
        clock = _Clock()
        try:
            async with self._session.post(self._url, json=body) as reply:
                if reply.status != 200:
                    clock.record.error = f"HTTP {reply.status}: {(await reply.text())[:500]}"
                    return clock.end()
                await self._read(reply, clock, cancel_after)
        except aiohttp.ClientError as error:
            clock.record.error = repr(error)
        return clock.end()

    @staticmethod
    async def _read(reply: aiohttp.ClientResponse, clock: _Clock, cancel_after: int | None) -> None:
        messages = 0
        async for line in reply.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                clock.record.error = str(event["error"])
                return
            if event.get("choices"):
                # a message may hold several tokens; the usage at the end says how many there were in all
                messages += 1
                clock.tokens(1)
            if event.get("usage"):
                clock.record.prompt_tokens = event["usage"]["prompt_tokens"]
                clock.record.output_tokens = event["usage"]["completion_tokens"]
            if cancel_after is not None and messages >= cancel_after:
                clock.record.cancelled = True
                return
