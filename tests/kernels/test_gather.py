"""Gather against indexing, for every element size."""

from __future__ import annotations

import pytest
import torch

from kernels.gather import gather, gather_reference

TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize(("n", "width", "count"), [(1, 1, 1), (5, 7, 3), (100, 576, 33), (3, 2500, 2), (4, 8, 0)])
def test_matches_the_reference(on: str, n: int, width: int, count: int, dtype: torch.dtype) -> None:
    table, rows = torch.randint(-100, 100, (n, width)).to(on, dtype), torch.randint(n, (count,)).to(on)
    out = torch.full((count, width), 77).to(on, dtype)
    assert torch.equal(gather(table, rows), gather_reference(table, rows))
    assert gather(table, rows, out=out) is out
    assert torch.equal(out, gather_reference(table, rows))


def test_every_bit_is_copied(on: str) -> None:
    bits = torch.tensor([[0x7FC0, 0x7F81, -1], [-32768, 1, 0x7F80]], dtype=torch.int16, device=on)  # NaNs, -0, denormal
    copied = gather(bits.view(torch.bfloat16), torch.tensor([1, 0, 1], device=on))
    assert torch.equal(copied.view(torch.int16), bits[[1, 0, 1]])


@TRITON
def test_triton_gives_zeros_for_a_row_out_of_range(on: str) -> None:
    table = torch.randn(4, 1030, device=on)
    out = torch.full((5, 1030), torch.nan, device=on)
    gather(table, torch.tensor([3, 4, -1, 2**62, 0], device=on), out=out)
    assert torch.equal(out[[0, 4]], table[[3, 0]])
    assert not out[1:4].any()


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
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        gather(table.to("meta"), rows)
