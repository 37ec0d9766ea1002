"""The same bits: tokens and log-probabilities are equal, bit for bit, whatever happens around a request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import DEFAULT_MODEL_POOLS, Cluster, Result
from tests.e2e import prompts

MAX_TOKENS = 20


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


def workload(vocab_size: int) -> list[inference_pb2.GenerateRequest]:
    """32 requests: texts, chats and block edges; the longest has some hundred tokens."""
    chosen = [r for r in prompts.requests() if len(r.token_ids.ids) < 1500]
    extra = [
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompts.token_ids(length, seed=8)))
        for length in (48, 64)
    ]
    requests = [sampled(request, number) for number, request in enumerate([*chosen, *extra])][:32]
    for request in requests:
        if request.token_ids.ids:
            ids = [token % vocab_size for token in request.token_ids.ids]
            request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=ids))
    # 4 blocks of prompt and 2 of each output: by itself more than the pool of the cases that preempt, however fast
    # the others come and go
    requests[-1].sampling.n = 24
    return requests


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
    inline: bool = False


CHUNK_16 = (("prefill.chunk_tokens", 16), ("prefill.batch_tokens", 48))
UNCACHED = (("prefill.prefix_cache", False), ("decode.prefix_cache", False))
INLINE = (("transport.disable", ["shared_memory"]), ("transport.checksum", True))
SMALL_AND_LARGE = (("prefill.block_tokens", 8), ("decode.block_tokens", 32))
SWAP = (("decode.num_blocks", 40), ("decode.preemption", "swap"))
RECOMPUTE = (("decode.num_blocks", 40), ("decode.preemption", "recompute"))
# workers of both phases; no request has more outputs than may run
SPLIT_FUSE = (("decode.max_running", 32), ("decode.batch_tokens", 48))

# each of the surroundings below at least once, several at a time: starting processes is what takes long here
TOGETHER = (
    Case("chunk 512, and a prefix cache hit in full", settings=(("prefill.chunk_tokens", 512),), repeat=2, caches=True),
    Case("chunk 16, one thread, prefix cache off", settings=(*CHUNK_16, *UNCACHED, ("threads", 1))),
    Case("2P2D, inline, blocks of 8 and 32", prefill=2, decode=2, settings=(*INLINE, *SMALL_AND_LARGE), inline=True),
    Case("preempted by swap", settings=SWAP, preempts=True),
    Case("both phases in one, preempted by recompute", prefill=0, settings=(*RECOMPUTE, *SPLIT_FUSE), preempts=True),
    Case("both phases in one, and a prefix cache hit in full", prefill=0, settings=SPLIT_FUSE, repeat=2, caches=True),
    Case("prefill's blocks are larger", settings=(("prefill.block_tokens", 64),), repeat=2),
)
# one at a time, to find out which it is
ALONE = (
    Case("among 32 neighbours, chunk 512", settings=(("prefill.chunk_tokens", 512),)),
    Case("chunk 16", settings=CHUNK_16),
    Case("chunk 64", settings=(("prefill.chunk_tokens", 64), ("prefill.batch_tokens", 64))),
    Case("prefix cache off", settings=UNCACHED),
    Case("prefix cache hit in full", repeat=2, caches=True),
    Case("one thread", settings=(("threads", 1),)),
    Case("2P1D", prefill=2),
    Case("1P2D", decode=2),
    Case("2P2D", prefill=2, decode=2),
    Case("local prefill", prefill=0),
    Case("both phases in each of two", prefill=0, decode=2, settings=SPLIT_FUSE, repeat=2),
    Case("both phases in one, preempted by swap", prefill=0, settings=(*SWAP, *SPLIT_FUSE), preempts=True),
    Case("inline transport", settings=INLINE, inline=True),
    Case("decode's blocks are larger", settings=SMALL_AND_LARGE),
    Case("preempted by recompute", settings=RECOMPUTE, preempts=True),
)


KINDS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
# these change the shapes of the arithmetic; the others are checked in bfloat16 alone
SHAPES_CHANGE = (TOGETHER[0], TOGETHER[1], TOGETHER[3])
REPEATED = (("int4", TOGETHER[0]), ("int4", TOGETHER[1]))
CASES_BY_KIND = [
    # float32 and int8 take the ways of bfloat16 and int4
    pytest.param(
        kind,
        case,
        id=f"{kind}-{case.name}",
        marks=[pytest.mark.slow] * (kind in ("float32", "int8") or case in ALONE or (kind, case) in REPEATED),
    )
    for kind in KINDS
    for case in (*TOGETHER, *ALONE)
    if kind == "bfloat16" or case in SHAPES_CHANGE
]


@dataclass(frozen=True)
class Served:
    """A model and its settings, and what it answers when each request is asked alone, nothing cached."""

    folder: Path
    settings: dict[str, object]
    requests: list[inference_pb2.GenerateRequest]
    expected: list[Result]

    @classmethod
    async def measure(cls, folder: Path, settings: dict[str, object], num_requests: int = 32) -> Served:
        nothing_cached = {**settings, "prefill.prefix_cache": False, "decode.prefix_cache": False}
        async with Cluster(model=str(folder), settings=nothing_cached) as cluster:
            [model] = (await cluster.stub.ListModels(inference_pb2.ListModelsRequest())).models
            requests = workload(model.vocab_size)[-num_requests:]
            return cls(folder, settings, requests, [await cluster.generate(request) for request in requests])

    async def check(self, case: Case) -> None:
        """Asks everything at once, in the surroundings of the case."""
        settings = {**self.settings, **dict(case.settings)}
        async with Cluster(
            model=str(self.folder), prefill=case.prefill, decode=case.decode, settings=settings
        ) as cluster:
            for round_number in range(case.repeat):
                order = list(range(len(self.requests)))
                random.Random(case.name).shuffle(order)
                answers = await asyncio.gather(*(cluster.generate(self.requests[i]) for i in order))
                results = dict(zip(order, answers, strict=True))
                for number, expected in enumerate(self.expected):
                    assert results[number].outputs == expected.outputs, f"{number} differs: {self.requests[number]}"
                if case.caches and round_number:
                    for result in results.values():
                        # the last token is always computed: its logits are wanted
                        assert result.usage.cached_tokens >= (result.usage.prompt_tokens - 1) // 16 * 16
            if case.preempts:
                assert sum(result.receipt.preemptions for result in results.values()) > 0
            if case.inline:
                assert all(r.receipt.transport == types_pb2.TRANSPORT_INLINE for r in results.values())
            await cluster.settled()


@pytest.fixture(scope="module")
def measured() -> dict[str, Served]:
    """What was measured already, by model and kind."""
    return {}


@pytest.mark.parametrize(("kind", "case"), CASES_BY_KIND)
async def test_tiny_model(
    kind: str, case: Case, tiny_model: Callable[[str], Path], measured: dict[str, Served]
) -> None:
    """A model whose attention has a sliding window, the kind that chunks and caches break first."""
    key = f"tiny {kind}"
    if key not in measured:
        measured[key] = await Served.measure(tiny_model("mistral"), KINDS[kind])
    await measured[key].check(case)


@pytest.mark.slow  # the tiny models take the same ways
async def test_default_model(default_model: Path) -> None:
    """Small chunks, several workers and a small pool, all at once, on the model that `make serve` serves."""
    case = Case(
        "all at once",
        prefill=2,
        settings=(("prefill.chunk_tokens", 16), ("prefill.batch_tokens", 48), ("decode.num_blocks", 40)),
        preempts=True,
    )
    await (await Served.measure(default_model, {"dtype": "bfloat16"}, num_requests=8)).check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), CASES_BY_KIND)
async def test_default_model_every_case(
    kind: str, case: Case, default_model: Path, measured: dict[str, Served]
) -> None:
    key = f"default {kind}"
    if key not in measured:
        measured[key] = await Served.measure(default_model, {**KINDS[kind], **DEFAULT_MODEL_POOLS})
    await measured[key].check(case)
