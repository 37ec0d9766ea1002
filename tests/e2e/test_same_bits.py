"""The same bits: tokens and log-probabilities are equal, bit for bit, whatever happens around a request."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import Cluster, Result
from tests.e2e import prompts

MAX_TOKENS = 24


def sampled(request: inference_pb2.GenerateRequest, number: int) -> inference_pb2.GenerateRequest:
    """Greedy, seeded, penalised and fourfold requests by turns."""
    kinds = (
        types_pb2.SamplingParams(temperature=0),
        types_pb2.SamplingParams(temperature=0.8, top_p=0.9, seed=1000 + number),
        types_pb2.SamplingParams(temperature=1.1, top_k=40, seed=2000 + number, repetition_penalty=1.2),
        types_pb2.SamplingParams(temperature=1.0, min_p=0.02, seed=3000 + number, frequency_penalty=0.3, n=4),
    )
    request.sampling.CopyFrom(kinds[number % len(kinds)])
    request.sampling.max_tokens = MAX_TOKENS
    request.sampling.logprobs = 2
    request.sampling.ignore_eos = True
    return request


def workload() -> list[inference_pb2.GenerateRequest]:
    """32 requests: texts, chats and block edges; the longest has 120 tokens."""
    chosen = [r for r in prompts.requests() if len(r.token_ids.ids) < 1500]
    extra = [
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompts.token_ids(length, seed=8)))
        for length in (48, 64)
    ]
    return [sampled(request, number) for number, request in enumerate([*chosen, *extra])][:32]


@dataclass(frozen=True)
class Case:
    """What surrounds the requests."""

    name: str
    prefill: int = 1
    decode: int = 1
    settings: tuple[tuple[str, object], ...] = ()
    together: bool = True
    repeat: int = 1
    preempts: bool = False
    caches: bool = False


CASES = (
    Case("among 32 neighbours"),
    Case("chunk 16", settings=(("prefill.chunk_tokens", 16), ("prefill.batch_tokens", 48))),
    Case("chunk 64", settings=(("prefill.chunk_tokens", 64), ("prefill.batch_tokens", 64))),
    Case("chunk 512", settings=(("prefill.chunk_tokens", 512),)),
    Case(
        "prefix cache off",
        settings=(("prefill.prefix_cache", False), ("decode.prefix_cache", False)),
    ),
    Case("prefix cache hit in full", repeat=2, caches=True),
    Case("one thread", settings=(("threads", 1),)),
    Case("2P1D", prefill=2),
    Case("1P2D", decode=2),
    Case("2P2D", prefill=2, decode=2),
    Case("local prefill", prefill=0),
    Case(
        "inline transport",
        settings=(("transport.disable", ["shared_memory"]), ("transport.checksum", True)),
    ),
    Case("preempted by swap", settings=(("decode.num_blocks", 40), ("decode.preemption", "swap")), preempts=True),
    Case(
        "preempted by recompute",
        settings=(("decode.num_blocks", 40), ("decode.preemption", "recompute")),
        preempts=True,
    ),
)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
async def alone(request: pytest.FixtureRequest, default_model: Path) -> tuple[str, list[Result]]:
    """Each request asked alone, one after the other, nothing cached."""
    settings = {"dtype": request.param, "prefill.prefix_cache": False, "decode.prefix_cache": False}
    async with Cluster(model=str(default_model), settings=settings) as cluster:
        return request.param, [await cluster.generate(r) for r in workload()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_bits(case: Case, alone: tuple[str, list[Result]], default_model: Path) -> None:
    dtype, expected = alone
    if dtype == "float32" and case.name not in ("among 32 neighbours", "chunk 16", "preempted by swap"):
        pytest.skip("float32 runs the cases that change the shapes of the arithmetic; bfloat16 runs them all")
    settings = {"dtype": dtype, **dict(case.settings)}
    async with Cluster(
        model=str(default_model), prefill=case.prefill, decode=case.decode, settings=settings
    ) as cluster:
        for round_number in range(case.repeat):
            requests = workload()
            random.Random(case.name).shuffle(order := list(range(len(requests))))
            results = dict(
                zip(order, await asyncio.gather(*(cluster.generate(requests[i]) for i in order)), strict=True)
            )
            for number, result in enumerate(expected):
                assert results[number].outputs == result.outputs, f"request {number} differs: {requests[number]}"
            if case.caches and round_number:
                assert all(r.usage.cached_tokens >= r.usage.prompt_tokens // 16 * 16 - 16 for r in results.values())
        if case.preempts:
            assert sum(r.receipt.preemptions for r in results.values()) > 0
        await cluster.settled()
