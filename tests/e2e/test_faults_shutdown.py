"""SIGTERM: what runs comes to its end, what is new goes elsewhere, and the process ends with status 0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, failure, prompt

Code = grpc.StatusCode


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {
        "dtype": "float32",
        "max_context": 1024,
        "prefill.num_blocks": 160,
        "decode.num_blocks": 160,
        "prefill.chunk_tokens": 16,
        "drain_s": 30,
    }
    async with Cluster(model=str(tiny_model("llama")), prefill=2, decode=2, settings=settings) as cluster:
        yield cluster


async def test_decode_worker_drains(service: Cluster) -> None:
    request = ask(prompt(30), max_tokens=500, temperature=1.0, seed=1, n=2)
    undisturbed = await service.generate(request)
    stream = Stream(service.stub.Generate(request))
    await stream.until(5)
    leaving = await service.until(service.decode, lambda load: load.running)
    [staying] = [member for member in service.decode if member is not leaving]
    assert staying.process
    health = health_pb2_grpc.HealthStub(service.channel(leaving.grpc)).Watch(health_pb2.HealthCheckRequest())
    assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(leaving.stop())
    assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    new = await asyncio.gather(*(service.generate(ask(prompt(20, seed), max_tokens=4)) for seed in range(8)))
    assert {worker for result in new for worker in result.receipt.decode_workers} == {staying.process.ready.worker_id}
    assert not stopping.done()
    result = await stream.rest()
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts == 1
    assert await stopping == 0
    await leaving.restart()
    await service.known(leaving)


async def test_prefill_worker_drains(service: Cluster) -> None:
    request = ask(prompt(900), max_tokens=4, prompt_logprobs=0)
    undisturbed = await service.generate(request)
    reading = asyncio.create_task(service.generate(request))
    leaving = await service.until(service.prefill, lambda load: 0 < load.queued_tokens < 800)
    assert leaving.process
    leaving_id = leaving.process.ready.worker_id
    stopping = asyncio.create_task(leaving.stop())
    result = await reading
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts == 1
    assert list(result.receipt.prefill_workers) == [leaving_id]
    assert await stopping == 0
    new = await asyncio.gather(*(service.generate(ask(prompt(20, seed), max_tokens=4)) for seed in range(8)))
    assert leaving_id not in {worker for result in new for worker in result.receipt.prefill_workers}
    await service.settled()
    await leaving.restart()
    await service.known(leaving)


async def test_gateway_drains(service: Cluster) -> None:
    """Running requests end, those that come now are told to go elsewhere."""
    request = ask(prompt(30), max_tokens=500, temperature=1.0, seed=2)
    undisturbed = await service.generate(request)
    stream = Stream(service.stub.Generate(request))
    await stream.until(5)
    seen = len(service.log)
    stopping = asyncio.create_task(service.gateway.stop())
    await service.logged("stopping: 1 requests", after=seen)
    error = await failure(service.stub.Generate(ask(prompt(20), max_tokens=4)))
    assert error.code == Code.UNAVAILABLE
    assert error.retry_after_s
    result = await stream.rest()
    assert result.outputs == undisturbed.outputs
    assert await stopping == 0
    await service.settled()
    await service.gateway.restart()
    assert (await service.generate(request)).outputs == undisturbed.outputs
