"""Norms of heads in place against their float64 reference and the norms of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import record
from kernels.head_norm import head_norm, head_norm_reference
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
KINDS = pytest.mark.parametrize("kind", ["rms", "layer", "layer biased"])
OWN = pytest.mark.parametrize("own", [False, True], ids=["shared", "of each"])
# rows, total, first, heads, width
SHAPES = [(1, 1, 0, 1, 1), (3, 50, 5, 3, 7), (2, 700, 60, 1, 576), (2, 1300, 11, 9, 130)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(on: str, kind: str, own: bool, heads: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a call has besides x and first."""
    weight, bias = torch.randn(2, heads * width if own else width).to(on, dtype)
    given = {"weight": weight, "bias": bias if "biased" in kind else None, "eps": 1e-5}
    return given | {"kind": kind.split()[0], "num_heads": heads, "width": width}


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: part.double() if isinstance(part, Tensor) else part for name, part in given.items()}


@KINDS
@OWN
@DTYPES
@pytest.mark.parametrize(("rows", "total", "first", "heads", "width"), SHAPES)
def test_matches_the_reference(
    on: str, rows: int, total: int, first: int, heads: int, width: int, dtype: torch.dtype, own: bool, kind: str
) -> None:
    torch.manual_seed(total)
    x = (3 * torch.randn(rows, total) + 1).to(on, dtype)
    given = inputs(on, kind, own, heads, width, dtype)
    expected = head_norm_reference(x.double(), first=first, **double(given))
    before = x.clone()
    assert head_norm(x, first=first, **given) is x
    torch.testing.assert_close(x.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    end = first + heads * width
    assert torch.equal(x[:, :first], before[:, :first])
    assert torch.equal(x[:, end:], before[:, end:])


@KINDS
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["wide", "narrow"])
def test_a_head_has_the_bits_that_the_norm_of_rows_gives_it(kind: str, weight_dtype: torch.dtype) -> None:
    x, first = torch.randn(5, 400).bfloat16(), 9
    given = inputs("cpu", kind, True, 3, 70, weight_dtype)
    heads = x[:, first : first + 210].unflatten(1, (3, 70)).clone()
    head_norm(x, first=first, **given)
    for h in range(3):
        rows, weight = heads[:, h].contiguous(), given["weight"][70 * h : 70 * (h + 1)]
        bias = given["bias"]
        if bias is not None:
            bias = bias[70 * h : 70 * (h + 1)]
        alone = rms_norm(rows, weight, 1e-5) if kind == "rms" else layer_norm(rows, weight, bias, 1e-5)
        assert torch.equal(x[:, first + 70 * h : first + 70 * (h + 1)], alone)


def test_a_large_mean_costs_no_variance(on: str) -> None:
    torch.manual_seed(0)
    x = (1000 + torch.randn(2, 200)).to(on)
    given = inputs(on, "layer", False, 3, 64, torch.float32)
    expected = head_norm_reference(x.double(), first=3, **double(given))
    head_norm(x, first=3, **given)
    # the mean's own rounding remains, units of 6e-5; E[x^2] - E[x]^2 would be wrong by some percent
    torch.testing.assert_close(x.double(), expected, atol=3e-4 * 3, rtol=1e-5)


@KINDS
@DTYPES
def test_a_row_keeps_its_bits_among_others(on: str, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 400).to(on, dtype)
    given = inputs(on, kind, True, 3, 70, dtype)
    whole = head_norm(x.clone(), first=9, **given)
    for rows in (1, 3):
        assert torch.equal(head_norm(x[-rows:].clone(), first=9, **given), whole[-rows:])
    if given["kind"] == "rms":  # nor does a head know its neighbours
        given |= {"weight": given["weight"][70:], "num_heads": 2}
        assert torch.equal(head_norm(x.clone(), first=79, **given)[:, 79:], whole[:, 79:])


@KINDS
@DTYPES
def test_a_row_keeps_its_bits_on_any_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(200, 600).to(dtype)
    given = inputs("cpu", kind, False, 9, 64, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = head_norm(x.clone(), first=5, **given)
        torch.set_num_threads(2)
        assert torch.equal(head_norm(x.clone(), first=5, **given), whole)
    finally:
        torch.set_num_threads(before)


def test_a_replay_normalises_the_heads_of_the_moment() -> None:
    x, given = torch.zeros(3, 200), inputs("cpu", "layer biased", True, 3, 64, torch.float32)
    with record() as replay:
        head_norm(x, first=2, **given)
    later = torch.randn(3, 200)
    x.copy_(later)
    replay()
    assert torch.equal(x, head_norm(later, first=2, **given))


def test_no_rows_are_no_work(on: str) -> None:
    x = torch.empty(0, 64, device=on)
    assert head_norm(x, first=0, **inputs(on, "rms", False, 4, 16, torch.float32)).shape == (0, 64)


def test_broken_contracts_are_refused() -> None:
    x, weight = torch.randn(4, 32), torch.randn(8)
    given: dict[str, Any] = {"kind": "rms", "first": 8, "num_heads": 3, "width": 8}
    with pytest.raises(ValueError, match="kind must be one of rms, layer, got 'batch'"):
        head_norm(x, weight, None, 1e-5, **given | {"kind": "batch"})
    with pytest.raises(ValueError, match="bias must be None for kind 'rms'"):
        head_norm(x, weight, weight, 1e-5, **given)
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16"):
        head_norm(x.t(), weight, None, 1e-5, **given)
    for wrong in ({"first": 9}, {"first": -1}, {"num_heads": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="must be heads within x's 32 columns"):
            head_norm(x, weight, None, 1e-5, **given | wrong)
    with pytest.raises(ValueError, match=r"weight must be contiguous torch.float32 or float32 \[8\] or \[24\]"):
        head_norm(x, torch.randn(16), None, 1e-5, **given)
    with pytest.raises(ValueError, match="weight must be"):
        head_norm(x, weight.double(), None, 1e-5, **given)
    with pytest.raises(ValueError, match=r"bias must be .*weight and bias alike"):
        head_norm(x, weight, torch.randn(24), 1e-5, **given | {"kind": "layer"})
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        head_norm(x.to("meta"), weight, None, 1e-5, **given)
