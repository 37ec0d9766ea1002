"""Activations against their float64 references, and the accuracy of the exponential under them and attention."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import activate, activate_reference, gated, gated_reference
from kernels.cpu import library

KINDS = pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu", "quick_gelu"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@KINDS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (1, 1536), (5, 1537)])
def test_matches_the_reference(on: str, kind: str, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    gate_up = (4 * torch.randn(rows, 2 * width)).to(on, dtype)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=on)
    assert gated(gate_up, kind, out=out) is out
    torch.testing.assert_close(out.double(), gated_reference(gate_up.double(), kind), atol=1e-6, rtol=TOLERANCE[dtype])


@KINDS
@DTYPES
@pytest.mark.parametrize("bias_dtype", ["none", "own", "float32"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (4, 1025)])
def test_plain_ones_match_the_reference(
    on: str, kind: str, rows: int, width: int, bias_dtype: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(width)
    x, bias = (4 * torch.randn(rows, width)).to(on, dtype), torch.randn(width).to(on, dtype)
    if bias_dtype == "float32":
        bias = bias.float()
    given, wide = (None, None) if bias_dtype == "none" else (bias, bias.double())
    out = torch.full_like(x, torch.nan)
    assert activate(x, kind, given, out=out) is out
    torch.testing.assert_close(
        out.double(), activate_reference(x.double(), kind, wide), atol=1e-6, rtol=TOLERANCE[dtype]
    )
    assert activate(x, kind, given, out=x) is x
    assert torch.equal(x, out)


def test_gelu_keeps_the_digits_of_its_negative_side(on: str) -> None:
    x = torch.linspace(-8, 8, 40_001, device=on)[None]
    exact = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    y = activate(x, "gelu")
    torch.testing.assert_close(y.double(), exact, atol=0, rtol=6e-6)  # the rounding of x^2 / 2 alone costs 2e-6
    near = x.abs() < 1
    torch.testing.assert_close(y.double()[near], exact[near], atol=0, rtol=6e-7)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, under the interpreter
@KINDS
def test_extremes(on: str, kind: str) -> None:
    gate = torch.tensor([-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, torch.nan], device=on)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    out = gated(gate_up, kind)
    assert out[0, -1].isnan()
    torch.testing.assert_close(out[0, 1:-1].cpu(), torch.tensor([0.0, 0.0, 0.0, 90.0, 1000.0]))
    torch.testing.assert_close(out[0, 0].item(), 0.0, atol=1e-7, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@KINDS
def test_extremes_of_plain_ones(on: str, kind: str) -> None:
    x = torch.tensor([[-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, 1e30, torch.nan]], device=on)
    out = activate(x, kind)[0].cpu()
    assert out[-1].isnan()
    torch.testing.assert_close(out[:-1], torch.tensor([0.0, 0.0, 0.0, 0.0, 90.0, 1000.0, 1e30]), atol=1e-7, rtol=0)


@KINDS
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(kind: str) -> None:
    gate_up = torch.randn(64, 3072)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = gated(gate_up, kind)
        torch.set_num_threads(2)
        assert torch.equal(gated(gate_up, kind), whole)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 2, 3, 17):
        assert torch.equal(gated(gate_up[-rows:], kind), whole[-rows:])


@KINDS
@DTYPES
def test_a_plain_row_keeps_its_bits_among_others(on: str, kind: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(9, 1030).to(on, dtype), torch.randn(1030).to(on, dtype)
    whole = activate(x, kind, bias)
    for rows in (1, 2, 3, 7):
        assert torch.equal(activate(x[-rows:], kind, bias), whole[-rows:])
    # one formula: a gate beside ones, or beside other rows
    beside_ones, plain = torch.cat([x, torch.ones_like(x)], 1), activate(x, kind)
    assert torch.equal(gated(beside_ones, kind), plain)
    assert torch.equal(gated(beside_ones[-3:], kind), plain[-3:])


def test_no_rows_are_no_work(on: str) -> None:
    assert gated(torch.empty(0, 64, device=on), "silu").shape == (0, 32)
    assert activate(torch.empty(0, 64, device=on), "gelu").shape == (0, 64)


def test_exponential_is_within_two_ulp() -> None:
    x = torch.cat([torch.linspace(-87, 87, 2_000_001), torch.linspace(-1, 1, 200_001)])
    y = torch.empty_like(x)
    library.call("tandem_exp", x.data_ptr(), y.data_ptr(), x.numel())
    exact = x.double().exp()
    ulp = torch.finfo(torch.float32).eps * torch.exp2(exact.log2().floor())
    assert ((y.double() - exact).abs() / ulp).max() < 2
    edges = torch.tensor([0.0, -0.0, -87.1, -torch.inf, torch.nan])
    out = torch.empty_like(edges)
    library.call("tandem_exp", edges.data_ptr(), out.data_ptr(), edges.numel())
    assert out[:4].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert out[4].isnan()


def test_broken_contracts_are_refused() -> None:
    gate_up = torch.randn(4, 32)
    with pytest.raises(ValueError, match="gate_up must be"):
        gated(gate_up[:, :31], "silu")
    with pytest.raises(ValueError, match="out must be"):
        gated(gate_up, "silu", out=torch.empty(4, 32))
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        gated(gate_up.to("meta"), "silu")
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu, relu, quick_gelu, got 'swish'"):
        gated(gate_up, "swish")
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu, relu, quick_gelu, got 'swish'"):
        activate(x, "swish")
    with pytest.raises(ValueError, match="x must be"):
        activate(x.t(), "relu")
    with pytest.raises(ValueError, match="bias must be"):
        activate(x, "relu", x[0, :31])
    with pytest.raises(ValueError, match="bias must be"):
        activate(x, "relu", x[0].double())
    with pytest.raises(ValueError, match="out must be"):
        activate(x, "relu", out=x[:3])
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        activate(x.to("meta"), "relu")
