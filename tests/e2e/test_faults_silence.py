"""Connections on which nothing is said for longer than every keepalive, and processes that hang and do not die.

Slow, for the keepalives are the ones that are served with.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from shared.rpc import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS
from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, prompt
from tests.workers import DecodeCall, Request, sampling

# until a ping is due, and until its answer does not come
KEEPALIVE_S = (KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS) / 1000
SILENCE_S = KEEPALIVE_S + 15

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {
        "dtype": "float32",
        "max_context": 1024,
        "prefill.num_blocks": 80,
        "decode.num_blocks": 80,
        "prefill.chunk_tokens": 16,
        "gateway.recovery_wait_s": 60,
    }
    async with Cluster(model=str(tiny_model("llama")), prefill=2, decode=2, settings=settings) as cluster:
        yield cluster


async def test_a_burst_after_silence(service: Cluster) -> None:
    """SGLang #9926: the first requests after an idle time failed, and pings earned quiet streams a GOAWAY."""
    request = ask(prompt(40), max_tokens=8, temperature=1.0, seed=1)
    expected = await service.generate(request)
    # both pools are taken: this one's streams stay open and quiet for the whole time
    holders = [DecodeCall(service.channel(member.grpc), Request(prompt(1000), sampling())) for member in service.decode]
    for holder in holders:
        await holder.admit()
    quiet = asyncio.create_task(service.generate(ask(prompt(700), max_tokens=8)))
    await service.until(service.decode, lambda load: load.waiting)
    seen = len(service.log)
    await asyncio.sleep(SILENCE_S)
    assert not quiet.done()
    assert not [line for line in service.log[seen:] if "is gone" in line]
    for holder in holders:
        holder.call.cancel()
    assert (await quiet).receipt.attempts == 1
    results = await asyncio.gather(*(service.generate(request) for _ in range(50)))
    assert all(result.outputs == expected.outputs and result.receipt.attempts == 1 for result in results)
    await service.settled()


@pytest.mark.parametrize("kind", ["decode", "prefill"])
async def test_a_worker_that_hangs(service: Cluster, kind: str) -> None:
    """It is found out by its silence; when it wakes it gives back what it held, and serves again."""
    long = ask(prompt(900), max_tokens=100, temperature=1.0, seed=2, prompt_logprobs=0)
    expected = await service.generate(long)
    stream = Stream(service.stub.Generate(long, timeout=120))
    if kind == "decode":
        await stream.until(20)
        hung = await service.until(service.decode, lambda load: load.running)
    else:
        reading = asyncio.create_task(stream.until(1))
        hung = await service.until(service.prefill, lambda load: 0 < load.queued_tokens < 800)
    seen = len(service.log)
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        stopped_s = time.monotonic()
        if kind == "prefill":
            await reading
        result = await stream.rest()
        assert time.monotonic() - stopped_s < KEEPALIVE_S + 10
        assert result.outputs == expected.outputs
        assert result.receipt.attempts == 2
        # the others serve meanwhile, and nobody asks the one that hangs
        short = ask(prompt(40), max_tokens=8)
        for _ in range(8):
            await service.generate(short, timeout_s=5)
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    assert hung.process
    await service.logged(service.gateway.name, f"({hung.process.ready.worker_id}) is alive", after=seen)
    await service.settled()
