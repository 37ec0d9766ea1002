"""What the ranks of a ragged engine do in tests. Processes that import this load no more than an engine takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.engine import RaggedEngine, SchedulingError, SplitFuse, ragged_engine
from shared.parallel.group import Group
from shared.sampling_params import SamplingParams
from shared.sequence_state import SequenceState
from tests.shared.engine.ragged import ragged_engine as make_engine
from tests.shared.engine.ragged import some_tokens

TOKENS = some_tokens(23)


@dataclass(frozen=True)
class Told:
    """What an engine answered. state: of the first 19 of TOKENS; blocks: that it has."""

    logits: list[Tensor]
    state: SequenceState
    after_import: Tensor
    scheduled: list[list[int]]  # what SplitFuse came to


def told(engine: RaggedEngine, foreign: SequenceState | None = None) -> Told:
    """A prompt in parts beside another, offloaded and restored, exported, and another one's state gone on with."""
    logits = [engine.put([1, 2], [TOKENS[:12], TOKENS[:5]]), engine.put([1], [TOKENS[12:19]])]
    state = engine.export_sequence(1)
    engine.offload(1)
    assert torch.equal(engine.export_sequence(1).blocks, state.blocks)
    engine.put([3], [TOKENS[:9]])
    engine.restore(1)
    logits.append(engine.put([2, 1], [[7], TOKENS[19:22]]))
    engine.flush(3)
    engine.import_sequence(4, foreign or state)
    after_import = engine.put([4], [TOKENS[19:]])
    free, total = engine.free_blocks, engine.num_blocks
    with pytest.raises(SchedulingError):
        engine.put([1, 2], [[5] * 20, [5] * 20])
    assert engine.free_blocks == free
    for uid in (1, 2, 4):
        engine.flush(uid)
    assert engine.free_blocks == total
    return Told(logits, state, after_import, scheduled(engine))


def scheduled(engine: RaggedEngine) -> list[list[int]]:
    """Greedy and drawn tokens, with too few blocks for all."""
    scheduler = SplitFuse(engine)
    uids = [
        scheduler.submit(some_tokens(length), SamplingParams(max_tokens=14, seed=length, temperature=length % 2))
        for length in (9, 24, 12, 3)
    ]
    generated = {request.uid: request.generated for request in scheduler.run()}
    assert scheduler.given_up
    return [generated[uid] for uid in uids]


def on_ranks_check(group: Group, models: list[tuple[str, str, SequenceState]]) -> list[tuple[Told, Told]]:
    """Of each (model, folder, state of one process): what its ranks say, and what those say that were serialized."""
    options: dict[str, Any] = {"tensor_parallel": {"tp_size": group.size}}
    answers: list[tuple[Told, Told]] = []
    for model, folder, alone in models:
        engine = make_engine(Path(model), **options)
        first = told(engine, alone)
        engine.serialize(folder)
        answers.append((first, told(make_engine(Path(folder), **options))))
    check_memory(group, Path(models[0][0]), answers[0][0].state.layout.block_bytes // group.size, options)
    return answers


def check_memory(group: Group, model: Path, block_bytes: int, options: dict[str, Any]) -> None:
    """All ranks have as many blocks as the one with the least memory, and none goes on where one has none."""
    limits = {"memory_config": {"mode": "reserve", "size": 1}}

    def with_blocks(*free: int) -> RaggedEngine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ragged_engine, "free_memory", lambda device: free[group.rank] * block_bytes + 1)
            return make_engine(model, limits=limits, **options)

    assert with_blocks(9, 7).num_blocks == 6  # and the null block
    with pytest.raises(ValueError, match="Insufficient memory to allocate KV-caches"):
        with_blocks(9, 1)
