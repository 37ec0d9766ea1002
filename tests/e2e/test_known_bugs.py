"""Bugs that other servers of this design shipped: blocks that leak, engines that wedge, blocks read or written late.

Most tests play the gateway's part against real worker processes, to stop at points that a gateway passes in no time.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import decode_pb2, prefill_pb2, types_pb2, worker_pb2, worker_pb2_grpc

import shared.worker
from cli.supervisor import Member
from shared.rpc import connect
from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, failure, prompt
from tests.workers import (
    DecodeCall,
    Output,
    PrefillCall,
    Request,
    Result,
    generate,
    hand_over,
    receive,
    running_worker,
    sampling,
)

Code = grpc.StatusCode
SETTINGS = {
    "dtype": "float32",
    "max_context": 256,
    "prefill.num_blocks": 25,
    "decode.num_blocks": 29,
    "prefill.chunk_tokens": 16,
    "prefill.batch_tokens": 48,
    "transport.checksum": True,
}


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """Small pools: 24 and 28 blocks."""
    async with Cluster(model=str(tiny_model("llama")), settings=SETTINGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
async def inline_prefill(service: Cluster) -> Member:
    """A prefill worker that hands bytes over gRPC; the gateway does not know it."""
    service.prefill.append(await service.add_prefill({"transport.disable": ["shared_memory"]}))
    return service.prefill[-1]


@pytest.fixture(autouse=True)
async def nothing_is_left(service: Cluster) -> AsyncIterator[None]:
    yield
    await service.settled()


def wire_request(length: int, seed: int = 1, **params: Any) -> Request:
    return Request(prompt(length, seed), sampling(**params))


async def reference(service: Cluster, request: Request) -> Any:
    """The bits of a request that nothing disturbs, and that no cache helps."""
    alone = Request(request.token_ids, request.params, cache_salt=f"reference {random.random()}")
    prefill, decode = service.prefill[0].grpc, service.decode[0].grpc
    return (await generate(service.channel(prefill), service.channel(decode), alone)).bits


async def test_prefill_killed_between_reserved_and_begin(service: Cluster) -> None:
    """vLLM #46283: decode's blocks stayed reserved for ever."""
    decode = DecodeCall(service.channel(service.decode[0].grpc), wire_request(100))
    await decode.admit()
    prefill = PrefillCall(service.channel(service.prefill[0].grpc), decode.request)
    extent = await prefill.next_extent()
    assert extent is not None
    await decode.import_blocks(1, extent)
    assert (await service.load(service.decode[0])).allocated_blocks >= 7
    await service.prefill[0].kill()
    assert (await failure(prefill.call)).code == Code.UNAVAILABLE
    decode.call.cancel()
    await service.settled()
    await service.prefill[0].restart()
    await service.known(service.prefill[0])


async def test_decode_refuses_before_admission(service: Cluster) -> None:
    """vLLM #41269: prefill's blocks were stranded for 480 s. Here decode is asked first, and prefill not at all."""
    before = await service.load(service.prefill[0])
    refused = ask(prompt(200), n=128, max_tokens=4)  # 128 outputs need more than the pool
    error = await failure(service.stub.Generate(refused))
    assert error.code == Code.INVALID_ARGUMENT
    assert error.field
    assert await service.load(service.prefill[0]) == before


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_decode_refuses_after_prefill(service: Cluster, first: str) -> None:
    """The other way round: first tokens that decode cannot take; prefill is free as soon as its stream is ended."""
    decode = DecodeCall(service.channel(service.decode[0].grpc), wire_request(100))
    await decode.admit()
    prefill = PrefillCall(service.channel(service.prefill[0].grpc), decode.request)
    while extent := await prefill.next_extent():
        await decode.import_blocks(1, extent)
    if first == "prefill":
        prefill.call.cancel()
    await decode.begin(1, [prefill_pb2.FirstToken(index=7, token_id=5)])
    error = await failure(decode.call)
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "begin.first_tokens")
    prefill.call.cancel()


STEPS = 14


async def walk(
    decode_channel: grpc.aio.Channel, prefill_channel: grpc.aio.Channel, request: Request, steps: int
) -> tuple[DecodeCall, PrefillCall | None]:
    """The gateway's part, left after so many steps."""
    decode = DecodeCall(decode_channel, request)
    prefill: PrefillCall | None = None

    async def go() -> AsyncIterator[None]:
        nonlocal prefill
        yield  # 1: the stream is open
        await decode.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**request.fields)))
        yield  # 2: admitted, or about to be
        reserved = await decode.read()
        assert reserved is not None
        yield  # 3: reserved
        prefill = PrefillCall(prefill_channel, request, reserved.reserved.held_tokens)
        yield  # 4: prefill is asked
        first = await prefill.next_extent()
        assert first is not None
        yield  # 5: some blocks are computed
        await decode.import_blocks(1, first)
        yield  # 6: and about to be copied
        while extent := await prefill.next_extent():
            await decode.import_blocks(1, extent)
        yield  # 7: all are
        await decode.begin(1, prefill.first_tokens.tokens)
        yield  # 8: about to join the batch
        imported = await decode.read()
        assert imported is not None
        assert imported.HasField("imported")
        yield  # 9: imported, and prefill not told
        prefill.call.cancel()
        yield  # 10: prefill ends
        while True:
            await decode.read()
            yield  # 11 and more: tokens come

    walking = go()
    for _ in range(steps):
        await anext(walking)
    await walking.aclose()
    return decode, prefill


@pytest.mark.parametrize("order", ["decode first", "prefill first", "connections lost"])
async def test_cancelled_at_every_step(service: Cluster, order: str) -> None:
    """llm-d: a cancel between prefill's answer and decode's scheduler left blocks to a lease. No traffic follows."""
    for steps in range(1, STEPS + 1):
        request = wire_request(100, seed=steps, max_tokens=100, n=1 + steps % 3, temperature=1.0)
        async with connect(service.decode[0].grpc) as to_decode, connect(service.prefill[0].grpc) as to_prefill:
            decode, prefill = await walk(to_decode, to_prefill, request, steps)
            calls = [decode.call] + ([prefill.call] if prefill else [])
            for call in {"decode first": calls, "prefill first": calls[::-1], "connections lost": []}[order]:
                call.cancel()
        left_s = time.monotonic()
        await service.settled()
        assert time.monotonic() - left_s < 5.0, f"after step {steps}"


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17])
async def test_cancelled_at_a_token(service: Cluster, num_tokens: int) -> None:
    """SGLang #11399: a cancel never reached the engine over gRPC."""
    stream = Stream(service.stub.Generate(ask(prompt(90), max_tokens=160, n=2, temperature=1.0, seed=1)))
    if num_tokens:
        await stream.until(num_tokens)
    stream.call.cancel()
    left_s = time.monotonic()
    await service.settled()
    assert time.monotonic() - left_s < 5.0


async def test_abandoned_requests_in_a_full_pool(service: Cluster) -> None:
    """TensorRT-LLM #12313: a full pool never recovered without new work. Connections just go away here."""
    async with connect(service.decode[0].grpc) as decode, connect(service.prefill[0].grpc) as prefill:
        calls = [DecodeCall(decode, wire_request(200, seed)) for seed in range(8)]
        for call in calls:
            await call.call.write(decode_pb2.DecodeRequest(admit=decode_pb2.Admit(**call.request.fields)))
        prefills = [PrefillCall(prefill, call.request) for call in calls]
        await service.until(service.decode[0], lambda load: load.running == 2 and load.waiting == 6)
        await service.until(service.prefill[0], lambda load: load.exports and load.waiting >= 6)
        assert prefills
    await service.settled()


async def test_bursts_of_cancels(service: Cluster) -> None:
    """TensorRT-LLM #11715: prefill wedged while its health stayed fine."""
    probe = ask(prompt(40), max_tokens=8)
    expected = await service.generate(probe)
    rng = random.Random(5)
    health = health_pb2_grpc.HealthStub(service.channel(service.prefill[0].grpc))
    for burst in range(5):
        calls = [
            service.stub.Generate(ask(prompt(rng.choice((5, 40, 150)), i), max_tokens=30, n=rng.choice((1, 2))))
            for i in range(300)
        ]
        # each burst is cut when the workers are further on
        for call in calls[: 4 * burst]:
            await call.read()
        for call in calls:
            call.cancel()
        assert (await service.generate(probe)).outputs == expected.outputs
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    await service.settled()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_wedged_loop_is_not_serving(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, role: Literal["prefill", "decode"]
) -> None:
    """TensorRT-LLM #13713. A worker in this process, for nothing outside it can stop one thread of another."""
    monkeypatch.setattr(shared.worker, "WEDGED_AFTER_S", 1.0)
    released = threading.Event()
    async with running_worker(role, tiny_model("llama")) as (worker, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        worker._thread.post(lambda: released.wait(60) or None)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # the process answers, for the loop is another thread's
        info = await worker_pb2_grpc.WorkerServiceStub(channel).GetInfo(worker_pb2.GetInfoRequest(), timeout=2)
        assert info.worker_id == worker.worker_id
        released.set()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@pytest.mark.parametrize("transport", ["shared_memory", "inline"])
async def test_exported_blocks_are_not_evicted(service: Cluster, inline_prefill: Member, transport: str) -> None:
    """TensorRT-LLM #12542: blocks were evicted from the prefix cache while a transfer read them."""
    prefill = service.channel((service.prefill[0] if transport == "shared_memory" else inline_prefill).grpc)
    decode = service.channel(service.decode[0].grpc)
    request = wire_request(150, seed=2, temperature=1.0)
    expected = await reference(service, request)
    call = DecodeCall(decode, request)
    result = Result(reserved=await call.admit())
    exported = PrefillCall(prefill, request, result.reserved.held_tokens)
    await exported.finish()
    # ten blocks are exported and not copied yet; others fill the rest of the pool three times over
    for seed in range(4):
        await asyncio.gather(*(generate(prefill, decode, wire_request(90, 10 * seed + i)) for i in range(2)))
    for extent in exported.extents:
        await call.import_blocks(1, extent)
    await call.begin(1, exported.first_tokens.tokens)
    for token in exported.first_tokens.tokens:
        result.outputs[token.index] = Output()
        result.outputs[token.index].add(0, [token.token_id], [], token.finish_reason)
    assert (await receive(call, result, exported)).bits == expected
    assert result.imported is not None
    assert result.imported.transport == types_pb2.Transport.Value(f"TRANSPORT_{transport.upper()}")


@pytest.mark.parametrize("transport", ["shared_memory", "inline"])
async def test_no_write_after_an_abort(service: Cluster, inline_prefill: Member, transport: str) -> None:
    """SGLang #35049, vLLM #32255: a late write spoilt the next owner's blocks.

    The pool has room for one of the two requests: the second gets the blocks into which the first one was importing.
    """
    prefill = service.channel((service.prefill[0] if transport == "shared_memory" else inline_prefill).grpc)
    decode = service.channel(service.decode[0].grpc)
    victim, heir = wire_request(240, seed=3, max_tokens=4), wire_request(230, seed=4, max_tokens=20, temperature=1.0)
    expected = await reference(service, heir)
    for number in range(20):
        heir.cache_salt = str(number)
        aborted = DecodeCall(decode, victim)
        held = (await aborted.admit()).held_tokens
        exported = PrefillCall(prefill, victim, held)
        while extent := await exported.next_extent():
            await aborted.import_blocks(1, extent)
        aborted.call.cancel()
        inheriting = DecodeCall(decode, heir)
        result = Result(reserved=await inheriting.admit())
        exported.call.cancel()
        stream = await hand_over(inheriting, prefill, result)
        assert (await receive(inheriting, result, stream)).bits == expected
