"""Tiny models in pairs: as transformers computes them, and injected."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.engine import InferenceEngine, init_inference
from tests.tiny_models import tiny_model

MAX_OUT_TOKENS = 96
# one each of the ways in which a model tells tokens' places apart
KINDS = ("llama", "gpt2", "bloom")


def plain_model(kind: str) -> Any:
    """As transformers loads it, for a test that may do with it what it likes."""
    return AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32).eval()


@functools.cache
def reference(kind: str) -> Any:
    """The same, shared by tests."""
    return plain_model(kind)


@functools.cache
def injected(kind: str) -> InferenceEngine:
    """Shared by tests; max_out_tokens is MAX_OUT_TOKENS."""
    return init_inference(plain_model(kind), kernel_inject=True, dtype="float32", max_out_tokens=MAX_OUT_TOKENS)


def num_free(engine: InferenceEngine) -> int:
    """Blocks of the pool that no cache holds."""
    assert engine._injection
    assert engine._injection.causal_lm
    pool = engine._injection.causal_lm._pool
    return pool.allocator.num_free


def prompts(rows: int = 3, columns: int = 12) -> Tensor:
    """Of tokens that are no special ones."""
    return torch.randint(5, 300, (rows, columns), generator=torch.Generator().manual_seed(rows * 100 + columns))


def mask_of(side: str, rows: int = 3, columns: int = 12) -> Tensor:
    """Row n has 3 * n columns of padding, on that side."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, slice(3 * row) if side == "left" else slice(columns - 3 * row, None)] = 0
    return mask if side != "none" else torch.ones_like(mask)
