"""Health is that of the engine's loop, not of the server that answers for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import worker_pb2, worker_pb2_grpc

import shared.worker
from tests.workers import running_worker

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_wedged_loop_turns_not_serving_and_comes_back(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.worker, "WEDGED_AFTER_S", 0.8)
    monkeypatch.setattr(shared.worker, "HEALTH_INTERVAL_S", 0.01)
    async with running_worker("decode", tiny_model("llama")) as (worker, channel):
        request = health_pb2.HealthCheckRequest(service="tandem.v1.DecodeService")
        watch = health_pb2_grpc.HealthStub(channel).Watch(request)
        assert (await watch.read()).status == SERVING
        release = threading.Event()
        worker._thread.post(release.wait)
        async with asyncio.timeout(10):
            assert (await watch.read()).status == NOT_SERVING
            release.set()
            assert (await watch.read()).status == SERVING
            await worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest())
            assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_a_loop_that_fails_is_told(tiny_model: Callable[[str], Path]) -> None:
    async with running_worker("decode", tiny_model("llama")) as (worker, _):

        def broken() -> None:
            raise RuntimeError("state unknown")

        worker._thread.post(broken)
        with pytest.raises(RuntimeError, match="state unknown"):
            async with asyncio.timeout(10):
                await asyncio.shield(worker.failed)
