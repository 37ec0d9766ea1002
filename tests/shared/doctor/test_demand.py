"""What a configuration takes of a host, counted before anything is started."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.config import load_config
from shared.doctor.demand import MIB, Demand


def demand(model: Path, **overrides: Any) -> Demand:
    return Demand.of(load_config(None, {"model": str(model), "threads": 4, **overrides}))


def test_every_rank_is_a_process(tiny_model: Callable[[str], Path]) -> None:
    """Pools, swapped blocks and threads of ops are of all ranks together; Python and torch of each."""
    model = tiny_model("llama")
    one, two = demand(model), demand(model, tp=2)
    process = one.prefill_bytes - 256 * MIB
    assert two.prefill_bytes - one.prefill_bytes == two.decode_bytes - one.decode_bytes == process
    assert 0 < two.threads - one.threads < 2 * 48
    assert two.weights_bytes == one.weights_bytes > 0


def test_ranks_of_another_number_hold_slices_of_their_own(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("llama")
    one, mixed = demand(model), demand(model, decode={"tp": 2})
    assert mixed.prefill_bytes == one.prefill_bytes
    assert mixed.weights_bytes == 2 * one.weights_bytes
    assert demand(model, decode={"tp": 2}, up={"prefill": 0}).weights_bytes == one.weights_bytes
