"""Bugs that other servers of this design shipped: wrong tokens, wrong counts, requests that crash a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tandem.v1 import types_pb2

from tests.cluster import Cluster, Result
from tests.e2e.faults import ask, failure, prompt

Code = grpc.StatusCode
CONTEXT = 320
EOS = 2
BLOCK = 16


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {"dtype": "float32", "max_context": CONTEXT, "prefill.num_blocks": 256, "decode.num_blocks": 512}
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
async def nothing_is_left(service: Cluster) -> AsyncIterator[None]:
    yield
    await service.settled()


def salted(request: Any, cache_salt: str) -> Any:
    request.cache_salt = cache_salt
    return request


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 48, 160])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_prompt_that_is_cached_in_full(service: Cluster, length: int, n: int) -> None:
    """vLLM #52617, #46898, TensorRT-LLM #11727: another first token, a wrong count, the first logprobs lost."""
    sampling: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 9, "n": n, "logprobs": 3}
    cold, warm, hot = [await service.generate(ask(prompt(length, n), **sampling)) for _ in range(3)]
    assert warm.outputs == cold.outputs
    assert hot.outputs == cold.outputs
    # the last token is always computed: its logits are wanted
    cached = (length - 1) // BLOCK * BLOCK
    assert [r.usage.cached_tokens for r in (cold, warm, hot)] == [0, cached, cached]
    for result in (cold, warm, hot):
        assert result.usage.prompt_tokens == length
        assert result.usage.completion_tokens == 20 * n
        for output in result.outputs.values():
            assert [p.chosen.token_id for p in output.logprobs] == output.token_ids
            assert all(len(p.top) == 3 for p in output.logprobs)
    other = await service.generate(salted(ask(prompt(length, n), **sampling), f"other {length} {n}"))
    assert other.outputs == cold.outputs
    assert other.usage.cached_tokens == 0


async def test_logprobs_of_a_cached_prompt(service: Cluster) -> None:
    """Reported for each prompt token, cached or not, equal bit for bit."""
    plain = ask(prompt(70), max_tokens=3)
    asked = ask(prompt(70), max_tokens=3, prompt_logprobs=2)
    await service.generate(plain)
    first, second = await service.generate(asked), await service.generate(asked)
    assert [p.chosen.token_id for p in first.prompt_logprobs] == prompt(70)[1:]
    assert second.prompt_logprobs == first.prompt_logprobs
    assert second.outputs == first.outputs
    alone = await service.generate(salted(ask(prompt(70), max_tokens=3, prompt_logprobs=2), "alone"))
    assert alone.prompt_logprobs == first.prompt_logprobs


MIXED: list[dict[str, Any]] = [
    {},
    {"top_k": 5, "temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"top_p": 0.5, "temperature": 0.7, "seed": 3, "stop": ["q"]},
    {"min_p": 0.1, "temperature": 1.3, "seed": 4, "stop": ["aa", "zz", "the end"]},
    {"repetition_penalty": 1.3, "logit_bias": {5: 4.0, 6: -100.0}},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5, "temperature": 0.9, "seed": 5, "n": 3},
    {"stop_token_ids": [40, 41, 42], "temperature": 1.0, "seed": 6},
    {"ignore_eos": False, "logit_bias": {EOS: 3.0}, "temperature": 1.0, "seed": 7, "min_tokens": 4},
    {"logprobs": 20, "prompt_logprobs": 5},
    {"logprobs": 0, "top_k": 1, "temperature": 2.0, "seed": 8},
    {"max_tokens": 1},
]


async def test_mixed_parameters_in_one_batch(service: Cluster) -> None:
    """MII: one request with top_k among others was a TypeError, stop strings of different counts a RuntimeError."""
    requests = [ask(prompt(12 + i, i), **{"max_tokens": 40, **sampling}) for i, sampling in enumerate(MIXED)]
    alone = [await service.generate(request) for request in requests]
    together = await asyncio.gather(*(service.generate(request) for request in requests * 2))
    for number, result in enumerate(together):
        assert result.outputs == alone[number % len(alone)].outputs, MIXED[number % len(MIXED)]
        assert result.prompt_logprobs == alone[number % len(alone)].prompt_logprobs


def cut(text: str, stop: str) -> str:
    assert stop in text
    return text[: text.index(stop)]


async def test_stop_strings_across_tokens(service: Cluster) -> None:
    """MII matched stop strings as single tokens of the vocabulary."""
    sampling: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 17}
    free = (await service.generate(ask(prompt(9), **sampling))).outputs[0]

    async def text_of(num_tokens: int) -> str:
        output = (await service.generate(ask(prompt(9), **{**sampling, "max_tokens": num_tokens}))).outputs[0]
        assert output.token_ids == free.token_ids[:num_tokens]
        return output.text

    for position in (5, 20, 40):
        # two characters of one token, two of the next
        boundary = len(await text_of(position))
        stop = free.text[boundary - 2 : boundary + 2]
        result = await service.generate(ask(prompt(9), **sampling, stop=["never there", stop]))
        output = result.outputs[0]
        assert output.text == cut(free.text, stop)
        assert (output.stop_match, output.finish_reason) == (stop, types_pb2.FINISH_REASON_STOP)
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        assert result.usage.completion_tokens == len(output.token_ids) == len(output.logprobs)
        assert stop not in await text_of(len(output.token_ids) - 1), "it goes on after the stop string"


async def test_eos_with_stop_strings(service: Cluster) -> None:
    """MII dropped EOS once stop strings were given."""
    sampling: dict[str, Any] = {
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": 3,
        "ignore_eos": False,
        "logit_bias": {EOS: 4.0},
    }
    without = (await service.generate(ask(prompt(8), **sampling))).outputs[0]
    assert (without.token_ids[-1], without.finish_reason) == (EOS, types_pb2.FINISH_REASON_STOP)
    assert 1 < len(without.token_ids) < 200
    with_stops = (await service.generate(ask(prompt(8), **sampling, stop=["not in there", "nor this"]))).outputs[0]
    assert with_stops == without
    assert with_stops.stop_match == ""
    late = (await service.generate(ask(prompt(8), **sampling, min_tokens=len(without.token_ids)))).outputs[0]
    assert len(late.token_ids) > len(without.token_ids)
    assert EOS not in late.token_ids[:-1]


async def test_one_over_the_cap(service: Cluster) -> None:
    """DeepSpeed #3758 read illegal memory."""
    fits = await service.generate(ask(prompt(CONTEXT - 1), max_tokens=1))
    assert len(fits.outputs[0].token_ids) == 1
    fills = await service.generate(ask(prompt(CONTEXT - 20)))
    assert len(fills.outputs[0].token_ids) == 20
    assert fills.outputs[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    for request, field in (
        (ask(prompt(CONTEXT), max_tokens=1), "token_ids"),
        (ask(prompt(CONTEXT + 1), max_tokens=1), "token_ids"),
        (ask(prompt(CONTEXT - 1), max_tokens=2), "sampling.max_tokens"),
        (ask(prompt(10), max_tokens=CONTEXT - 9), "sampling.max_tokens"),
    ):
        error = await failure(service.stub.Generate(request))
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, field)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_requests", [480, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_the_answers_do_not_decay(service: Cluster, num_requests: int) -> None:
    """SGLang #23020: right answers fell from 94 to 50 percent within some hundred requests."""
    kinds = [ask(prompt(5 + 7 * i, i), max_tokens=12, temperature=1.0, seed=i, n=1 + i % 2) for i in range(16)]
    expected = [await service.generate(request) for request in kinds]

    async def one(number: int) -> Result:
        return await service.generate(kinds[number % len(kinds)])

    for first in range(0, num_requests, 48):
        results = await asyncio.gather(*(one(number) for number in range(first, first + 48)))
        wrong = [
            number
            for number, result in enumerate(results, first)
            if result.outputs != expected[number % len(kinds)].outputs
        ]
        assert not wrong, f"requests {wrong} differ"
