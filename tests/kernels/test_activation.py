"""Gated activations against their float64 references, and the accuracy of the exponential under them and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.activation import gated_gelu_tanh, gated_gelu_tanh_reference, gated_silu, gated_silu_reference
from kernels.cpu import library

BOTH = pytest.mark.parametrize(
    ("activation", "reference"),
    [(gated_silu, gated_silu_reference), (gated_gelu_tanh, gated_gelu_tanh_reference)],
    ids=["silu", "gelu_tanh"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@BOTH
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (1, 1536), (50, 1537)])
def test_matches_the_reference(
    activation: Callable[..., Tensor], reference: Callable[[Tensor], Tensor], rows: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(width)
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    out = torch.full((rows, width), torch.nan, dtype=dtype)
    assert activation(gate_up, out=out) is out
    tolerance = 4e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(out.double(), reference(gate_up.double()), atol=1e-6, rtol=tolerance)


@BOTH
def test_extremes(activation: Callable[..., Tensor], reference: Callable[[Tensor], Tensor]) -> None:
    gate = torch.tensor([-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, torch.nan])
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    out = activation(gate_up)
    assert out[0, -1].isnan()
    torch.testing.assert_close(out[0, 1:-1], torch.tensor([0.0, 0.0, 0.0, 90.0, 1000.0]))


@BOTH
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    activation: Callable[..., Tensor], reference: Callable[[Tensor], Tensor]
) -> None:
    gate_up = torch.randn(64, 3072)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = activation(gate_up)
        torch.set_num_threads(2)
        assert torch.equal(activation(gate_up), whole)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 2, 3, 17):
        assert torch.equal(activation(gate_up[-rows:]), whole[-rows:])


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
        gated_silu(gate_up[:, :31])
    with pytest.raises(ValueError, match="out must be"):
        gated_silu(gate_up, out=torch.empty(4, 32))
    with pytest.raises(ValueError, match="run on: cpu"):
        gated_silu(gate_up.to("meta"))
