"""Tokens of the step before, by hand and against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.feed import feed, feed_reference


def test_by_hand(on: str) -> None:
    token_ids = torch.tensor([5, 6, 7, 8, 9], device=on)
    sources = torch.tensor([-1, 2, 0, 1, 9], dtype=torch.int32, device=on)
    drawn = torch.tensor([40, -1, 60], device=on)
    out = torch.full((5,), -7, device=on)
    assert feed(token_ids, sources, drawn, out=out) is out
    assert out.tolist() == [5, 60, 40, 0, 0]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_matches_the_reference(on: str, rows: int) -> None:
    torch.manual_seed(rows)
    token_ids, drawn = torch.randint(0, 1000, (2, rows), device=on)
    sources = torch.randint(-1, rows, (rows,), device=on).int()
    out = torch.full((rows + 3,), -7, device=on)
    feed(token_ids, sources, drawn, out=out[:rows])
    assert torch.equal(out[:rows], feed_reference(token_ids, sources, drawn))
    assert out[rows:].tolist() == [-7] * 3


def test_broken_contracts_are_refused() -> None:
    ids, sources = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="sources must be"):
        feed(ids, ids, ids, out=ids)
    with pytest.raises(ValueError, match="token_ids must be"):
        feed(sources, sources, ids, out=ids)
    with pytest.raises(ValueError, match="out must be of 3 rows"):
        feed(ids, sources, ids, out=ids[:2])
    with pytest.raises(ValueError, match="drawn must be"):
        feed(ids, sources, sources, out=ids)
