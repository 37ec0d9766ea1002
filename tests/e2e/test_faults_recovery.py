"""Workers killed at any point: the client's stream goes on, bit for bit the undisturbed one, each token exactly once.

Joining a stream checks that no position is missing or repeated; the killed workers come back by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tandem.v1 import worker_pb2

from cli.supervisor import Member
from tests.cluster import Cluster, Result
from tests.e2e.faults import Stream, ask, prompt

MAX_TOKENS = 240
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {7: 2.0, 9: -3.0},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": 11},
    "penalties": {**PENALTIES, "temperature": 0.8, "seed": 12},
    "four": {"temperature": 1.0, "seed": 13, "n": 4, "logprobs": 1},
    "four with penalties": {**PENALTIES, "temperature": 1.0, "seed": 14, "n": 4},
    "a length and a prompt's logprobs": {"temperature": 1.0, "seed": 15, "prompt_logprobs": 1, "max_tokens": 130},
}


def running(load: worker_pb2.WatchLoadResponse) -> bool:
    return bool(load.running)


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """Two of each kind, which come back when they die."""
    settings = {
        "dtype": "float32",
        "max_context": 1024,
        "prefill.num_blocks": 256,
        "decode.num_blocks": 256,
        "prefill.chunk_tokens": 16,
        "prefill.batch_tokens": 16,
        "gateway.max_attempts": 12,
        "gateway.recovery_wait_s": 60,
    }
    async with Cluster(model=str(tiny_model("llama")), prefill=2, decode=2, settings=settings, revive=True) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
async def some_are_alive(service: Cluster) -> AsyncIterator[None]:
    """Each test starts with a worker of each kind that the gateway knows, and leaves nothing held."""
    for group in (service.prefill, service.decode):
        if not any(member.alive for member in group):
            await service.logged(f"{group[0].name} | is back", after=len(service.log))
        await service.known(next(member for member in group if member.alive))
    yield
    await service.settled()


async def kill_while_decoding(service: Cluster, request: Any, at: tuple[int, ...]) -> Result:
    """Kills the decode worker that serves the request, each time an output has reached so many tokens."""
    stream = Stream(service.stub.Generate(request, timeout=120))
    for num_tokens in at:
        await stream.until(num_tokens)
        victim = await service.until(service.decode, running)
        await victim.kill()
    return await stream.rest()


# "seeded" is part of what has a seed and penalties, "four" of "four with penalties"
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("seeded", "four"))) for name in SAMPLINGS]
)
async def test_decode_killed_in_mid_stream(service: Cluster, name: str) -> None:
    request = ask(prompt(37), **{"max_tokens": MAX_TOKENS, **SAMPLINGS[name]})
    undisturbed = await service.generate(request)
    result = await kill_while_decoding(service, request, at=(30,))
    assert result.outputs == undisturbed.outputs
    assert result.prompt_logprobs == undisturbed.prompt_logprobs
    assert result.usage.completion_tokens == undisturbed.usage.completion_tokens
    assert result.receipt.attempts > 1
    assert len(result.receipt.decode_workers) == 2


async def test_decode_killed_before_a_stop_string(service: Cluster) -> None:
    """Stop strings that begin before the kill and after it; of four outputs each ends where it did."""
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 21, "n": 4, "max_tokens": MAX_TOKENS}
    free = await service.generate(ask(prompt(20), **sampling))
    stops = []
    for index, position in ((0, 20), (1, 60), (2, 120)):
        # the text around a token's end, so that it lies across a token boundary
        upto = await service.generate(ask(prompt(20), **{**sampling, "max_tokens": position}))
        end = len(upto.outputs[index].text)
        stops.append(free.outputs[index].text[end - 3 : end + 3])
    request = ask(prompt(20), **sampling, stop=stops)
    undisturbed = await service.generate(request)
    ended = [output for output in undisturbed.outputs.values() if output.stop_match]
    assert len(ended) >= 2, "the stop strings stop nothing"
    assert all(output.stop_match in stops for output in ended)
    result = await kill_while_decoding(service, request, at=(30,))
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts > 1


async def test_decode_killed_again_and_again(service: Cluster) -> None:
    """The second of two dies when the first is not back yet: the stream waits for it."""
    request = ask(prompt(33), max_tokens=MAX_TOKENS, temperature=1.0, seed=31, n=2)
    undisturbed = await service.generate(request)
    result = await kill_while_decoding(service, request, at=(20, 130))
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts > 2


async def test_decode_told_to_stop_at_once(service: Cluster) -> None:
    """SIGTERM with no time to drain: what runs goes on elsewhere."""
    request = ask(prompt(30), max_tokens=900, temperature=1.0, seed=35)  # it must not end before the worker does
    undisturbed = await service.generate(request)
    stream = Stream(service.stub.Generate(request))
    await stream.until(20)
    victim = await service.until(service.decode, running)
    assert await victim.stop() == 0
    result = await stream.rest()
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts > 1
    await victim.start()


async def test_prefill_killed_in_mid_prefill(service: Cluster) -> None:
    request = ask(prompt(900), max_tokens=8, temperature=0.8, seed=41, prompt_logprobs=1)
    undisturbed = await service.generate(request)
    assert undisturbed.receipt.attempts == 1
    stream = Stream(service.stub.Generate(request, timeout=120))
    # the first extents are copied, the last ones are not computed
    reading = asyncio.create_task(stream.rest())
    victim = await service.until(service.prefill, lambda load: 0 < load.queued_tokens < 700)
    assert victim.process
    victim_id = victim.process.ready.worker_id
    await victim.kill()
    result = await reading
    assert result.outputs == undisturbed.outputs
    assert result.prompt_logprobs == undisturbed.prompt_logprobs
    assert result.receipt.attempts == 2
    assert victim_id not in result.receipt.prefill_workers


@pytest.mark.slow
async def test_both_kinds_killed_in_turn(service: Cluster) -> None:
    """Every worker dies once while one stream runs, a prefill worker in the middle of a recovery's prefill."""
    # with log-probabilities of the prompt no cache shortens a prefill, the recovery's neither
    request = ask(prompt(600), max_tokens=MAX_TOKENS, temperature=0.9, seed=51, n=2, prompt_logprobs=0)
    undisturbed = await service.generate(request)
    stream = Stream(service.stub.Generate(request, timeout=120))
    await stream.until(20)
    await (await service.until(service.decode, running)).kill()
    reading = asyncio.create_task(stream.rest())
    killed: list[Member] = [await service.until(service.prefill, running)]
    await killed[0].kill()
    killed.append(await service.until(service.decode, running))
    await killed[1].kill()
    result = await reading
    assert result.outputs == undisturbed.outputs
    assert result.receipt.attempts >= 3


async def test_the_gateway_keeps_nothing_of_the_dead(service: Cluster) -> None:
    """Its channels, tasks and mappings are those of the workers that are there."""
    for member in service.workers:
        while not member.alive:
            await service.logged(f"{member.name} | is back", after=len(service.log))
    await service.known(*service.workers)
    request = ask(prompt(30), max_tokens=60)
    await service.generate(request)
    await service.settled()
    name = service.gateway.name
    before = {name: (await service.resources())[name]}
    seen = len(service.log)
    await asyncio.gather(*(victim.kill() for victim in service.workers))
    await asyncio.gather(*(service.logged(f"{victim.name} | is back", after=seen) for victim in service.workers))
    await service.known(*service.workers)
    await service.generate(request)
    await service.settled()
    await service.back_to(before)
