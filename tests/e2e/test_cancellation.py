"""Many requests, a third of them cancelled at random moments: the others are right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import DEFAULT_MODEL_POOLS, Cluster
from tests.e2e import prompts

MAX_TOKENS = 16


def mixed(number: int) -> inference_pb2.GenerateRequest:
    rng = random.Random(number)
    length = rng.choice((1, 7, 16, 33, 64, 120))
    sampling = types_pb2.SamplingParams(
        max_tokens=MAX_TOKENS, temperature=rng.choice((0, 0.7, 1.0)), seed=number, ignore_eos=True, logprobs=1
    )
    if rng.random() < 0.3:
        sampling.top_k = 20
    if rng.random() < 0.3:
        sampling.n = 2
    if rng.random() < 0.2:
        sampling.stop.extend([" the", "zzz"][: rng.randrange(1, 3)])
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[token % 380 for token in prompts.token_ids(length, seed=number % 40)]),
        sampling=sampling,
    )


async def cancel_somewhere(cluster: Cluster, request: inference_pb2.GenerateRequest, rng: random.Random) -> None:
    """Cancels before the first message, or after a few of them."""
    call = cluster.stub.Generate(request)
    after = rng.randrange(-1, 6)
    if after < 0:
        # let the request get somewhere between the gateway and its workers
        for _ in range(rng.randrange(50)):
            await asyncio.sleep(0)
    else:
        for _ in range(after):
            if await call.read() is grpc.aio.EOF:
                return
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.code() and await call.read()


@pytest.mark.parametrize("model", ["tiny", pytest.param("default", marks=pytest.mark.slow)])
async def test_two_hundred_requests_a_third_cancelled(
    model: str, default_model: Path, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model("llama") if model == "tiny" else default_model
    rng = random.Random(3)
    numbers = list(range(200))
    cancelled = set(rng.sample(numbers, 66))
    async with Cluster(model=str(folder), settings={} if model == "tiny" else DEFAULT_MODEL_POOLS) as cluster:
        expected = {n: await cluster.generate(mixed(n)) for n in rng.sample(sorted(set(numbers) - cancelled), 12)}
        await cluster.settled()
        before = await cluster.resources()
        tasks = {
            n: asyncio.create_task(
                cancel_somewhere(cluster, mixed(n), rng) if n in cancelled else cluster.generate(mixed(n))
            )
            for n in numbers
        }
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        for number in sorted(set(numbers) - cancelled):
            result = results[number]
            assert not isinstance(result, BaseException), (number, result)
            if number in expected:
                assert result.outputs == expected[number].outputs
        await cluster.settled()
        await cluster.back_to(before)
