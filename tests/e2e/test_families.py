"""One model of each kind through the three processes: transformers' greedy tokens, and an engine's own bits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tandem.v1 import inference_pb2, types_pb2
from transformers import AutoModelForCausalLM

from tests.cluster import Cluster

NEW_TOKENS = 20
LENGTHS = (1, 17, 40)
KINDS = {
    "gemma3": "rope, one for each kind of layer; windows; norms on both sides",
    "bloom": "ALiBi",
    "gpt2": "learned positions",
    "qwen2_moe": "experts",
}


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("gptj", marks=pytest.mark.slow)])
async def test_served_as_transformers_computes_it(kind: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = [[3 + (7 * i * length) % 370 for i in range(length)] for length in LENGTHS]
    requests = [
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=types_pb2.SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0, logprobs=1),
        )
        for prompt in prompts
    ]
    settings = {"dtype": "float32", "threads": 1, "prefill.chunk_tokens": 16}
    async with Cluster(model=str(folder), prefill=1, settings=settings) as cluster:
        together = await asyncio.gather(*map(cluster.generate, requests))
        alone = [await cluster.generate(request) for request in requests]
        await cluster.settled()
    for prompt, first, again in zip(prompts, together, alone, strict=True):
        tokens = first.outputs[0].token_ids
        assert tokens == again.outputs[0].token_ids
        assert first.outputs[0].logprobs == again.outputs[0].logprobs, "the same bits in company"
        assert first.receipt.handoff_bytes
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
