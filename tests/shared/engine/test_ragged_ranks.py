"""A ragged engine on two ranks: the bits of one process, and sequences that go to and from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.ragged_ranks import TOKENS, Told, on_ranks_check, told
from tests.ranks import on_ranks
from tests.shared.engine.ragged import ragged_engine

# two key-value heads, one on each rank; and one that both have
KINDS = ("llama", "falcon")


def same(one: Told, other: Told) -> bool:
    logits = zip([*one.logits, one.after_import], [*other.logits, other.after_import], strict=True)
    states = rows(one).equal(rows(other))
    return states and all(torch.equal(a, b) for a, b in logits) and one.scheduled == other.scheduled


def rows(told: Told) -> torch.Tensor:
    """Keys and values of the state's tokens, of every head."""
    state = told.state
    elements = state.layout.format.elements(state.blocks).permute(1, 2, 3, 0, 4, 5)
    return elements.flatten(3, 4)[:, :, :, : state.num_tokens]


def test_two_ranks_have_the_bits_of_one_and_hand_over_either_way(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engines = {kind: ragged_engine(tiny_model(kind)) for kind in KINDS}
    alone = {kind: told(engine) for kind, engine in engines.items()}
    models = [(str(tiny_model(kind)), str(tmp_path / kind), alone[kind].state) for kind in KINDS]
    for answers in on_ranks(on_ranks_check, 2, models):
        for kind, (first, again) in zip(KINDS, answers, strict=True):
            assert same(first, alone[kind])
            assert same(again, alone[kind])
            assert first.state.layout == alone[kind].state.layout
            # and back into one process
            engines[kind].import_sequence(1, first.state)
            assert torch.equal(engines[kind].put([1], [TOKENS[19:]]), first.after_import)
            engines[kind].flush(1)
    assert {path.name for path in (tmp_path / "llama").iterdir()} == {
        "config.json",
        "ragged.json",
        "params_rank_0_of_2",
        "params_rank_1_of_2",
    }
