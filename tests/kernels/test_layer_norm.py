"""LayerNorm against its float64 reference, and the same bits for a row among any others."""

from __future__ import annotations

import pytest
import torch

from kernels.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64), (2, 100), (17, 576), (40, 577), (1, 4096)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_matches_the_reference(
    on: str, rows: int, width: int, biased: bool, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(rows * width)
    x = (3 * torch.randn(rows, width) + 1).to(on, dtype)
    weight, bias = torch.randn(2, width).to(on, dtype)
    weight = weight.to(weight_dtype or dtype)
    out = torch.full_like(x, torch.nan)
    assert layer_norm(x, weight, bias if biased else None, 1e-5, out=out) is out
    expected = layer_norm_reference(x.double(), weight.double(), bias.double() if biased else None, 1e-5)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("width", [63, 576])
def test_a_large_mean_costs_no_variance(on: str, width: int) -> None:
    torch.manual_seed(width)
    x = (1000 + torch.randn(4, width)).to(on)
    weight = torch.ones(width, device=on)
    expected = layer_norm_reference(x.double(), weight.double(), None, 1e-5)
    # the mean's own rounding remains, units of 6e-5; E[x^2] - E[x]^2 would be wrong by some percent
    torch.testing.assert_close(layer_norm(x, weight, None, 1e-5).double(), expected, atol=3e-4, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (4, 63), (30, 576)])
def test_fused_addition_equals_addition_then_norm(on: str, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, residual = torch.randn(2, rows, width).to(on, dtype)
    weight, bias = torch.randn(2, width).to(on, dtype)
    y, total = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(total, weight, bias, 1e-5))
    if dtype == torch.float32:
        wide = add_layer_norm_reference(x.double(), residual.double(), weight.double(), bias.double(), 1e-5)
        torch.testing.assert_close((y.double(), total.double()), wide, atol=3e-6, rtol=3e-6)
    in_place = residual.clone()
    again, same = add_layer_norm(
        x, in_place, weight, bias, 1e-5, out=torch.full_like(x, torch.nan), residual_out=in_place
    )
    assert same is in_place
    assert torch.equal(again, y)
    assert torch.equal(in_place, total)


@DTYPES
def test_a_row_keeps_its_bits_among_others(on: str, dtype: torch.dtype) -> None:
    x, (weight, bias) = torch.randn(30, 577).to(on, dtype), torch.randn(2, 577).to(on, dtype)
    whole = layer_norm(x, weight, bias, 1e-5)
    for rows in (1, 2, 3, 5, 17):
        assert torch.equal(layer_norm(x[-rows:], weight, bias, 1e-5), whole[-rows:])


@DTYPES
def test_a_row_keeps_its_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x, (weight, bias) = torch.randn(256, 576).to(dtype), torch.randn(2, 576).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = layer_norm(x, weight, bias, 1e-5)
        torch.set_num_threads(2)
        assert torch.equal(layer_norm(x, weight, bias, 1e-5), whole)
    finally:
        torch.set_num_threads(before)


def test_no_rows_are_no_work(on: str) -> None:
    x = torch.empty(0, 64, device=on)
    assert layer_norm(x, torch.ones(64, device=on), None, 1e-5).shape == (0, 64)


def test_broken_contracts_are_refused() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16)
    with pytest.raises(ValueError, match="x must be contiguous"):
        layer_norm(x.t(), weight, None, 1e-5)
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16"):
        layer_norm(x.double(), weight, None, 1e-5)
    with pytest.raises(ValueError, match="weight must be"):
        layer_norm(x, weight[:8], None, 1e-5)
    with pytest.raises(ValueError, match="bias must be"):
        layer_norm(x, weight, weight.double(), 1e-5)
    with pytest.raises(ValueError, match="residual must be"):
        add_layer_norm(x, x[:2], weight, None, 1e-5)
    with pytest.raises(ValueError, match="residual_out must be"):
        add_layer_norm(x, x, weight, None, 1e-5, residual_out=x[:2])
    with pytest.raises(ValueError, match="out must be"):
        layer_norm(x, weight, None, 1e-5, out=x.bfloat16())
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        layer_norm(x.to("meta"), weight.to("meta"), None, 1e-5)
