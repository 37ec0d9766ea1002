"""Workers that do both phases: prompts in parts beside streams, and a worker that dies with either.

That their tokens have the same bits as those of prefill and decode workers is held in test_same_bits.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tandem.v1 import worker_pb2

from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, prompt

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_context": 2048,
    "decode.num_blocks": 256,
    "decode.max_running": 15,
    "decode.batch_tokens": 16,
    "gateway.max_attempts": 12,
    "gateway.recovery_wait_s": 60,
}
SAMPLING: dict[str, Any] = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2, "n": 3, "prompt_logprobs": 1}


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """Two workers, whose steps take 16 tokens: a prompt of 1,900 is 119 steps."""
    model = str(tiny_model("llama"))
    async with Cluster(model=model, prefill=0, decode=2, settings=SETTINGS, revive=True) as cluster:
        yield cluster


def running(load: worker_pb2.WatchLoadResponse) -> bool:
    return bool(load.running)


def computing_a_prompt(load: worker_pb2.WatchLoadResponse) -> bool:
    return 0 < load.queued_tokens < 1700


@pytest.mark.parametrize(
    ("length", "when"),
    [
        pytest.param(30, running, id="stream", marks=pytest.mark.slow),  # a leg like any other
        pytest.param(1900, computing_a_prompt, id="prompt"),
    ],
)
async def test_a_worker_that_dies_is_followed_by_the_other(service: Cluster, length: int, when: Any) -> None:
    request = ask(prompt(length), max_tokens=90, **SAMPLING)
    undisturbed = await service.generate(request)
    assert len(undisturbed.prompt_logprobs) == length - 1
    stream = Stream(service.stub.Generate(request, timeout=120))
    if when is running:
        await stream.until(30)
    seen = len(service.log)
    victim = await service.until(service.decode, when)
    await victim.kill()
    result = await stream.rest()
    assert result.outputs == undisturbed.outputs
    assert result.prompt_logprobs == undisturbed.prompt_logprobs
    assert result.receipt.attempts > 1
    assert result.receipt.prefill_workers == []
    await service.logged(f"{victim.name} | is back", after=seen)
    await service.known(*service.decode)
    await service.settled()


async def test_streams_go_on_while_a_long_prompt_is_computed(service: Cluster) -> None:
    streams = [ask(prompt(20, seed), max_tokens=400, temperature=0.8, seed=seed) for seed in range(2)]
    long = ask(prompt(1900, 9), max_tokens=4, temperature=0.8, seed=9)
    alone = [await service.generate(request) for request in (*streams, long)]
    begun = [Stream(service.stub.Generate(request, timeout=120)) for request in streams]
    for stream in begun:
        await stream.until(20)
    together = await asyncio.gather(service.generate(long), *(stream.rest() for stream in begun))
    assert [result.outputs for result in together] == [result.outputs for result in (alone[2], *alone[:2])]
    await service.settled()
