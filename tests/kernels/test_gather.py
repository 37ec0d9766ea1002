"""Gather against indexing, for every element size."""

from __future__ import annotations

import pytest
import torch

from kernels.gather import gather, gather_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("n", "width", "count"), [(1, 1, 1), (5, 7, 3), (100, 576, 33), (4, 8, 0)])
def test_matches_the_reference(n: int, width: int, count: int, dtype: torch.dtype) -> None:
    table, rows = torch.randint(-100, 100, (n, width)).to(dtype), torch.randint(n, (count,))
    out = torch.full((count, width), 77).to(dtype)
    assert torch.equal(gather(table, rows), gather_reference(table, rows))
    assert gather(table, rows, out=out) is out
    assert torch.equal(out, gather_reference(table, rows))


def test_broken_contracts_are_refused() -> None:
    table, rows = torch.zeros(4, 3), torch.tensor([0, 1])
    for number in (4, -1):
        with pytest.raises(IndexError, match=rf"rows\[1\] is {number}, and the table has 4 rows"):
            gather(table, torch.tensor([0, number]))
    with pytest.raises(ValueError, match="table must be"):
        gather(table.T, rows)
    with pytest.raises(ValueError, match="rows must be"):
        gather(table, rows.int())
    with pytest.raises(ValueError, match="out must be"):
        gather(table, rows, out=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="runs on: cpu"):
        gather(table.to("meta"), rows)
