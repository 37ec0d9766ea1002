"""Broken client connections: a stream resumed at a position, a retry under the same id, an id used twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tandem.v1 import inference_pb2, inference_pb2_grpc

from shared.rpc import connect
from tests.cluster import Cluster, Result
from tests.e2e.faults import Stream, ask, failure, prompt

Code = grpc.StatusCode
WINDOW_S = 2.0


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {
        "dtype": "float32",
        "max_context": 2048,
        "prefill.num_blocks": 160,
        "decode.num_blocks": 1200,
        "gateway.resume_window_s": WINDOW_S,
    }
    async with Cluster(model=str(tiny_model("llama")), settings=settings, revive=True) as cluster:
        yield cluster


class Wire:
    """A way to the gateway that can be cut in the middle of a message, as a network does it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._gateway = host, int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets every connection, and lets no other through."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._gateway)
        self._writers += [writer, there_writer]
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(_copy(source, sink))
            self._tasks.add(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.transport.abort()


@asynccontextmanager
async def broken_off(service: Cluster, request: Any, num_tokens: int) -> AsyncIterator[Result]:
    """What came of a request before its connection was cut."""
    async with Wire(service.grpc_target) as wire, connect(wire.target) as channel:
        stream = Stream(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
        await stream.until(num_tokens)
        wire.cut()
        error = await failure(stream.call)
        assert error.code == Code.UNAVAILABLE
        yield stream.received


def resume(service: Cluster, request_id: str, received: Result) -> Stream:
    positions = {index: len(output.token_ids) for index, output in received.outputs.items()}
    call = service.stub.Resume(inference_pb2.ResumeRequest(request_id=request_id, next_positions=positions))
    return Stream(call, received)


def same(one: Result, other: Result) -> bool:
    return (one.outputs, one.prompt_logprobs, one.resolved, one.usage) == (
        other.outputs,
        other.prompt_logprobs,
        other.resolved,
        other.usage,
    )


@pytest.mark.parametrize("n", [1, 3])
async def test_resumed_where_it_broke(service: Cluster, n: int) -> None:
    """The request goes on meanwhile; no seed is given, so that only this very run has these tokens."""
    request = ask(prompt(30, n), f"broken-{n}", max_tokens=250, temperature=1.0, n=n, prompt_logprobs=1)
    async with broken_off(service, request, num_tokens=40) as received:
        result = await resume(service, request.request_id, received).rest()
    again = ask(prompt(30, n), max_tokens=250, temperature=1.0, n=n, prompt_logprobs=1, seed=result.resolved.seed)
    expected = await service.generate(again)
    assert result.outputs == expected.outputs
    assert result.prompt_logprobs == expected.prompt_logprobs
    assert result.usage.completion_tokens == 250 * n


async def test_resumed_after_its_end_from_any_position(service: Cluster) -> None:
    request = ask(prompt(30), "ended", max_tokens=60, temperature=1.0, n=2)
    whole = await service.generate(request)
    for position in (0, 1, 31, 59, 60):
        call = service.stub.Resume(inference_pb2.ResumeRequest(request_id="ended", next_position=position))
        chunks = [reply.chunk async for reply in call]
        for index, output in whole.outputs.items():
            got = [token for c in chunks for o in c.outputs if o.index == index for token in o.token_ids]
            assert got == output.token_ids[position:]
        assert chunks[-1].usage == whole.usage
        assert chunks[-1].receipt == whole.receipt
    over = service.stub.Resume(inference_pb2.ResumeRequest(request_id="ended", next_position=61))
    error = await failure(over)
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "next_position")
    unknown = service.stub.Resume(inference_pb2.ResumeRequest(request_id="ended", next_positions={2: 0}))
    assert (await failure(unknown)).code == Code.INVALID_ARGUMENT


async def test_a_retry_gets_the_same_answer(service: Cluster) -> None:
    """While it runs a retry joins it, afterwards it reads what is kept: one request reaches the workers."""
    request = ask(prompt(25), "again", max_tokens=200, temperature=1.0, n=2)
    first = Stream(service.stub.Generate(request))
    await first.until(10)
    second = Stream(service.stub.Generate(request))
    results = await asyncio.gather(first.rest(), second.rest())
    results.append(await service.generate(request))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert len({result.timings.total_s for result in results}) == 1
    other = ask(prompt(25), max_tokens=200, temperature=1.0, n=2)
    assert not same(await service.generate(other), results[0]), "without an id, and a seed, nothing is repeated"


async def test_an_id_that_another_request_uses(service: Cluster) -> None:
    request = ask(prompt(25), "mine", max_tokens=150, temperature=1.0)
    stream = Stream(service.stub.Generate(request))
    await stream.until(5)
    for other in (ask(prompt(26), "mine", max_tokens=150, temperature=1.0), ask(prompt(25), "mine", max_tokens=151)):
        error = await failure(service.stub.Generate(other))
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "request_id")
    assert same(await stream.rest(), await service.generate(request))


async def test_nobody_comes_back(service: Cluster) -> None:
    """After the window the request is ended, its blocks are free, and its id is unknown."""
    request = ask(prompt(25), "left", max_tokens=2000, temperature=1.0, n=8)
    async with broken_off(service, request, num_tokens=5):
        assert (await service.load(service.decode[0])).running
        await service.settled()
        resumed = service.stub.Resume(inference_pb2.ResumeRequest(request_id="left"))
        assert (await failure(resumed)).code == Code.NOT_FOUND


async def test_decode_killed_while_the_client_is_away(service: Cluster) -> None:
    request = ask(prompt(30), "both", max_tokens=250, temperature=1.0, seed=5, n=2)
    expected = await service.generate(ask(prompt(30), max_tokens=250, temperature=1.0, seed=5, n=2))
    async with broken_off(service, request, num_tokens=30) as received:
        stream = resume(service, request.request_id, received)
        await service.decode[0].kill()
        result = await stream.rest()
    assert result.outputs == expected.outputs
    assert result.receipt.attempts > 1
    await service.settled()
