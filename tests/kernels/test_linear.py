"""Linear against its float64 reference, and the same bits for a row among any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear as module
from kernels.linear import LinearWeight, has_pairs, linear, linear_reference, probe_row_invariance
from tests.kernels.rows import assert_rows_keep_their_bits

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs"), [(576, 576), (960, 576), (576, 1536), (33, 71), (1, 8), (1000, 64)]
)


def make(outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(outputs + inputs)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    return weight, torch.randn(outputs).to(dtype) if bias else None


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_matches_the_reference(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight, offset = make(outputs, inputs, dtype, bias)
    packed = LinearWeight(weight, offset)
    x = torch.randn(19, inputs).to(dtype)
    y = linear(x, packed)
    assert y.dtype == dtype
    assert y.shape == (19, outputs)
    expected = linear_reference(x.double(), weight.double(), None if offset is None else offset.double())
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    packed = LinearWeight(*make(outputs, inputs, dtype, bias))
    assert_rows_keep_their_bits(packed, (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64, 100, 241, 256))


PAIRS = pytest.mark.skipif(not has_pairs(torch.bfloat16), reason="this CPU has no dot products of bfloat16 pairs")


def panels(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> LinearWeight:
    """A weight as CPUs without dot products of pairs have it."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_cpu_has_pairs", lambda: False)
        return LinearWeight(*arguments)


@SHAPES
def test_bfloat16_rounds_the_float32_product(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = make(outputs, inputs, torch.bfloat16, True)
    assert bias is not None
    packed, wide = panels(monkeypatch, weight, bias), LinearWeight(weight.float(), bias.float())
    for rows in (1, 5, 30):
        x = torch.randn(rows, inputs).bfloat16()
        expected = linear(x.float(), wide)
        assert torch.equal(linear(x, packed), expected.bfloat16())
        assert torch.equal(linear(x, packed, out=torch.empty(rows, outputs)), expected)


@PAIRS
@SHAPES
def test_products_of_pairs_have_the_same_bits(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = make(outputs, inputs, torch.bfloat16, True)
    of_pairs, of_panels = LinearWeight(weight, bias), panels(monkeypatch, weight, bias)
    assert of_pairs.description != of_panels.description
    for rows in (1, 3, 8, 9, 30):
        x = torch.randn(rows, inputs).bfloat16()
        out = torch.empty(2, rows, outputs)
        assert torch.equal(linear(x, of_pairs, out=out[0]), linear(x, of_panels, out=out[1]))


def test_the_probe_names_the_row_counts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = LinearWeight(*make(16, 16, torch.float32, False))

    def depends_on_rows(x: Tensor, weight: LinearWeight) -> Tensor:
        return linear(x, weight) + (1e-3 if len(x) in (2, 5) else 0)

    monkeypatch.setattr(module, "linear", depends_on_rows)
    with pytest.raises(RuntimeError, match=r"other bits for \[2, 5\] rows"):
        probe_row_invariance(packed)


def test_broken_contracts_are_refused() -> None:
    weight = torch.randn(8, 16)
    packed = LinearWeight(weight)
    with pytest.raises(ValueError, match="weight must be"):
        LinearWeight(weight.double())
    with pytest.raises(ValueError, match="bias must be"):
        LinearWeight(weight, torch.randn(9))
    with pytest.raises(ValueError, match="runs on: cpu"):
        LinearWeight(weight.to("meta"))
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 15), packed)
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 16).bfloat16(), packed)
    with pytest.raises(ValueError, match="out must be"):
        linear(torch.randn(2, 16), packed, out=torch.empty(2, 9))
    with pytest.raises(ValueError, match="out must be"):
        linear(torch.randn(2, 16), packed, out=torch.empty(2, 8).bfloat16())
