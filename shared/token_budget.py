"""How the prompts that are being computed share a step: a pure function.

Higher priorities take all they can use first. Among equals, half of the budget belongs to the prompt that arrived
first, so that a long one always goes on, and the rest to whoever is done soonest, so that a short one waits a step and
not for the long one before it. What nobody else wants returns to the first. So a short prompt's wait does not grow with
the length of the prompts before it, and a long prompt is at most half as fast as alone. With none behind it that has
less left, the first takes all it can use: sharing would only make both late.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple


class Demand(NamedTuple):
    """A prompt's wish for a step. The higher priority goes first; of equal ones, the lower arrival came first."""

    priority: int
    arrival: int
    remaining_tokens: int


def share_budget(demands: Sequence[Demand], batch_tokens: int, chunk_tokens: int) -> list[int]:
    """Tokens that each demand gets in this step, in their order: at most `chunk_tokens` each, `batch_tokens` in all."""
    granted = [0] * len(demands)
    left = batch_tokens
    order = sorted(range(len(demands)), key=lambda i: (-demands[i].priority, demands[i].arrival))
    for _, equals in groupby(order, key=lambda i: demands[i].priority):
        members = list(equals)
        first = members[0]
        shorter = any(demands[i].remaining_tokens < demands[first].remaining_tokens for i in members)
        granted[first] = min(demands[first].remaining_tokens, chunk_tokens, (left + 1) // 2 if shorter else left)
        left -= granted[first]
        for i in sorted(members[1:], key=lambda i: (demands[i].remaining_tokens, demands[i].arrival)):
            granted[i] = min(demands[i].remaining_tokens, chunk_tokens, left)
            left -= granted[i]
        extra = min(min(demands[first].remaining_tokens, chunk_tokens) - granted[first], left)
        granted[first] += extra
        left -= extra
        if left == 0:
            break
    return granted
