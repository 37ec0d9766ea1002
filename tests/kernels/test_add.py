"""The residual addition against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.add import add, add_reference


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64), (40, 577), (0, 8)])
def test_matches_the_reference(on: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, rows, width).to(on, dtype)
    out = torch.full_like(x, torch.nan)
    assert add(x, residual, out=out) is out
    assert torch.equal(out, add_reference(x.double(), residual.double()).to(dtype))
    in_place = residual.clone()
    assert torch.equal(add(x, in_place, out=in_place), out)


def test_refuses_what_does_not_fit() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"residual must be contiguous torch\.float32"):
        add(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"out must be contiguous torch\.float32 \[3, 8\]"):
        add(x, x, out=torch.empty(3, 9))
    with pytest.raises(ValueError, match="x must be contiguous"):
        add(x.double(), x)
