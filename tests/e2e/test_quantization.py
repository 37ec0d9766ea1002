"""The service with each form of its weights, and with keys and values in FP8 beside them: what it answers is what an
engine by itself computes, and what is left out is left out in all of its processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from tandem.v1 import inference_pb2, types_pb2

from shared.config import DEFAULT_MODEL, QuantizationMode, load_config
from shared.engine import Engine, EnginePlan
from shared.model_store import ModelStore
from tests.cluster import DEFAULT_MODEL_POOLS, Cluster
from tests.e2e.test_kv_dtype import greedy

MODES = tuple(mode for mode in get_args(QuantizationMode) if mode != "none")
PROMPT = [5 + i % 90 for i in range(37)]


def request(text: str | None = None, max_tokens: int = 40) -> inference_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    if text is not None:
        return inference_pb2.GenerateRequest(text=text, sampling=sampling)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling=sampling)


@pytest.mark.parametrize(
    ("mode", "kv_dtype", "exclude"),
    [
        ("fp8", "fp8", "layers.0.*,lm_head"),
        ("int8_dynamic", "auto", ""),
        *(pytest.param(mode, "auto", "", marks=pytest.mark.slow) for mode in MODES if mode != "int8_dynamic"),
    ],
)
async def test_a_stream_is_that_of_an_engine_by_itself(
    tiny_model: Callable[[str], Path], mode: QuantizationMode, kv_dtype: str, exclude: str
) -> None:
    model = str(tiny_model("qwen3"))
    settings = {"dtype": "float32", "quantization": mode, "kv_dtype": kv_dtype, "threads": 1}
    if exclude:
        settings["quantization_exclude"] = exclude
    config = load_config(None, {**settings, "model": model, "decode": {"num_blocks": 16}})
    engine = Engine(EnginePlan.of(config, config.decode, ModelStore().resolve(model)))
    expected = greedy(engine, PROMPT)
    async with Cluster(model=model, prefill=1, settings=settings) as cluster:
        result = await cluster.generate(request())
        await cluster.settled()
    assert result.outputs[0].token_ids == expected
    assert result.receipt.handoff_bytes == 3 * engine.plan.layout.block_bytes
    assert result.receipt.model_digest == engine.plan.layout.model_digest


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
async def test_the_default_model_answers(mode: QuantizationMode) -> None:
    settings = {"quantization": mode, **DEFAULT_MODEL_POOLS}
    async with Cluster(model=DEFAULT_MODEL, settings=settings) as cluster:
        both = await asyncio.gather(*(cluster.generate(request("The capital of France is", 8)) for _ in range(2)))
        await cluster.settled()
    assert "Paris" in both[0].outputs[0].text
    assert both[0].outputs[0].token_ids == both[1].outputs[0].token_ids
