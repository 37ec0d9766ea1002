"""Scaled, capped and clipped numbers against their float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.cpu.library import record
from kernels.scale import scale, scale_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
PARTS = pytest.mark.parametrize(
    "parts",
    [{}, {"soft_cap": 3.0}, {"clip": 2.5}, {"soft_cap": 3.0, "clip": 2.5}],
    ids=["scaled", "capped", "clipped", "capped and clipped"],
)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@DTYPES
@PARTS
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (2, 1030)])
def test_matches_the_reference(on: str, rows: int, width: int, parts: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x = (4 * torch.randn(rows, width)).to(on, dtype)
    out = torch.full_like(x, torch.nan)
    assert scale(x, -0.6, **parts, out=out) is out
    expected = scale_reference(x.double(), -0.6, **parts)
    torch.testing.assert_close(out.double(), expected, atol=0, rtol=TOLERANCE[dtype])
    assert scale(x, -0.6, **parts, out=x) is x
    assert torch.equal(x, out)


def test_a_cap_keeps_the_digits_of_small_numbers(on: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-30, 1, 2_001), torch.tensor([0.0])]).to(on)[None]
    y = scale(x, soft_cap=1.0)
    torch.testing.assert_close(y.double(), x.double().tanh(), atol=0, rtol=4e-7)
    assert (y.abs() <= 1).all()


@DTYPES
def test_extremes(on: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-torch.inf, -1e30, -50.0, 0.0, 50.0, 1e30, torch.inf, torch.nan]]).to(on, dtype)
    for parts, bound in (({"soft_cap": 2.0}, 2.0), ({"clip": 3.0}, 3.0), ({"soft_cap": 4.0, "clip": 3.0}, 3.0)):
        y = scale(x, **parts)[0].float().cpu()
        assert y[:-1].tolist() == [-bound] * 3 + [0.0] + [bound] * 3
        assert y[-1].isnan()


def test_alone_at_one_it_changes_nothing(on: str) -> None:
    x = torch.randn(3, 70, device=on).bfloat16()
    assert torch.equal(scale(x), x)


@DTYPES
@PARTS
def test_the_bits_do_not_depend_on_the_number_of_threads_or_rows(parts: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.randn(9, 20_001).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = scale(x, 5.0, **parts)
        torch.set_num_threads(2)
        assert torch.equal(scale(x, 5.0, **parts), whole)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 2, 5):
        assert torch.equal(scale(x[-rows:], 5.0, **parts), whole[-rows:])


@PARTS
def test_a_row_keeps_its_bits_among_others(on: str, parts: dict[str, Any]) -> None:
    x = torch.randn(4, 1030, device=on).bfloat16()
    whole = scale(x, 5.0, **parts)
    for rows in (1, 3):
        assert torch.equal(scale(x[-rows:], 5.0, **parts), whole[-rows:])


def test_a_replay_scales_the_numbers_of_the_moment() -> None:
    x = torch.randn(2, 100)
    with record() as replay:
        scale(x, 2.0, soft_cap=3.0, out=x)
    x.fill_(1)
    replay()
    assert torch.equal(x, scale(torch.ones(2, 100), 2.0, soft_cap=3.0))


def test_no_rows_are_no_work(on: str) -> None:
    assert scale(torch.empty(0, 64, device=on), 2.0).shape == (0, 64)


def test_broken_contracts_are_refused() -> None:
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match="x must be contiguous"):
        scale(x.t())
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16"):
        scale(x.double())
    with pytest.raises(ValueError, match="out must be"):
        scale(x, out=x[:2])
    with pytest.raises(ValueError, match="factor must be finite, got nan"):
        scale(x, torch.nan)
    for bound in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="soft_cap must be finite and above 0"):
            scale(x, soft_cap=bound)
        with pytest.raises(ValueError, match="clip must be finite and above 0"):
            scale(x, clip=bound)
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        scale(x.to("meta"))
