"""Ragged engines over tiny models, with limits that a test can reach."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from shared.engine import RaggedEngine

LIMITS = {
    "max_tracked_sequences": 4,
    "max_ragged_batch_size": 24,
    "max_ragged_sequence_count": 3,
    "max_context": 40,
    "memory_config": {"mode": "allocate", "size": 9},
    "offload": True,
}


def ragged_engine(
    model: Any, *, num_blocks: int = 9, limits: dict[str, Any] | None = None, **options: Any
) -> RaggedEngine:
    """In float32, with blocks of 8 tokens unless the test says otherwise."""
    memory = {"memory_config": {"mode": "allocate", "size": num_blocks}}
    options = {"dtype": "float32", "block_tokens": 8, **options}
    model = str(model) if isinstance(model, Path) else model
    return RaggedEngine(model, {"state_manager": {**LIMITS, **memory, **(limits or {})}}, **options)


def wide(**limits: Any) -> dict[str, Any]:
    """Limits that no small test comes to."""
    most = {"max_tracked_sequences": 64, "max_ragged_batch_size": 768, "max_ragged_sequence_count": 64}
    return {**most, "max_context": 2048, **limits}


def some_tokens(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, 380) for _ in range(length)]
