"""Quantized and float16 pools over processes: blocks handed over, swapped out and in have the bits of an engine by
itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tandem.v1 import inference_pb2, types_pb2

from shared.batch import BatchEntry
from shared.engine import Engine
from tests.cluster import Cluster
from tests.engines import tiny_engine

NEW_TOKENS = 40


def greedy(engine: Engine, prompt: list[int]) -> list[int]:
    """Computed in one piece and then token by token."""
    tokens, start, table = list(prompt), 0, list(range(1, 9))
    for _ in range(NEW_TOKENS):
        logits = engine.forward([BatchEntry(tokens[start:], start, table)])
        start = len(tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "int8"), pytest.param("float16", "float16", marks=pytest.mark.slow)]
)
async def test_streams_are_those_of_an_engine_by_itself(
    tiny_model: Callable[[str], Path], dtype: str, kv_dtype: str
) -> None:
    model = tiny_model("llama")
    # 11 blocks for what grows to 5 of 5: some are swapped out
    settings = {"dtype": dtype, "kv_dtype": kv_dtype, "threads": 1, "decode.num_blocks": 12}
    prompts = [[5 + (i * step) % 90 for i in range(37)] for step in (1, 3, 7, 11, 13)]
    requests = [
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=types_pb2.SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0, n=1),
        )
        for prompt in prompts
    ]
    async with Cluster(model=str(model), prefill=1, settings=settings) as cluster:
        results = await asyncio.gather(*map(cluster.generate, requests))
        await cluster.settled()
    engine = tiny_engine(model, kv_dtype=kv_dtype, dtype=dtype)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.outputs[0].token_ids == greedy(engine, prompt)
        assert result.receipt.handoff_bytes == 3 * engine.plan.layout.block_bytes
