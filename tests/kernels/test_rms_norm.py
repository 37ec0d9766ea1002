"""RMSNorm against its float64 reference, and the same bits for a row among any others."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64), (2, 100), (17, 576), (300, 577), (1, 4096)])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_matches_the_reference(
    on: str, rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(rows * width)
    x = (3 * torch.randn(rows, width)).to(on, dtype)
    weight = torch.randn(width).to(on, dtype).to(weight_dtype or dtype)
    out = torch.full_like(x, torch.nan)
    assert rms_norm(x, weight, 1e-5, out=out) is out
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (4, 63), (200, 576)])
def test_fused_addition_equals_addition_then_norm(on: str, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, residual = torch.randn(2, rows, width).to(on, dtype)
    weight = torch.randn(width).to(on, dtype)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5))
    if dtype == torch.float32:
        wide = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-5)
        torch.testing.assert_close((y.double(), total.double()), wide, atol=1e-6, rtol=2e-6)
    in_place = residual.clone()
    again, same = add_rms_norm(x, in_place, weight, 1e-5, out=torch.full_like(x, torch.nan), residual_out=in_place)
    assert same is in_place
    assert torch.equal(again, y)
    assert torch.equal(in_place, total)


@DTYPES
def test_a_row_keeps_its_bits_among_others(on: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(100, 576).to(on, dtype), torch.randn(576).to(on, dtype)
    whole = rms_norm(x, weight, 1e-5)
    for rows in (1, 2, 3, 5, 64):
        assert torch.equal(rms_norm(x[-rows:], weight, 1e-5), whole[-rows:])


@DTYPES
def test_a_row_keeps_its_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(256, 576).to(dtype), torch.randn(576).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = rms_norm(x, weight, 1e-5)
        torch.set_num_threads(2)
        assert torch.equal(rms_norm(x, weight, 1e-5), whole)
    finally:
        torch.set_num_threads(before)


def test_no_rows_are_no_work(on: str) -> None:
    x = torch.empty(0, 64, device=on)
    assert rms_norm(x, torch.ones(64, device=on), 1e-5).shape == (0, 64)


def test_broken_contracts_are_refused() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16)
    with pytest.raises(ValueError, match="x must be contiguous"):
        rms_norm(x.t(), weight, 1e-5)
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16"):
        rms_norm(x.double(), weight, 1e-5)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(x, weight[:8], 1e-5)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, x[:2], weight, 1e-5)
    with pytest.raises(ValueError, match="out must be"):
        rms_norm(x, weight, 1e-5, out=x.bfloat16())
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        rms_norm(x.to("meta"), weight.to("meta"), 1e-5)
