"""GroupNorm against its float64 reference, and the same bits for a group among any others."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.library import record
from kernels.group_norm import group_norm, group_norm_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
SILU = pytest.mark.parametrize("silu", [False, True], ids=["alone", "silu"])
# batch, channels, positions, groups
SHAPES = [(1, 6, 1, 2), (2, 6, 7, 3), (1, 12, 100, 2), (1, 10, 1025, 2), (1, 2, 9001, 1)]
LARGE = [(2, 320, 4096, 32), (1, 1280, 1024, 32), (1, 128, 512 * 512, 32)]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check(on: str, shape: tuple[int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, silu: bool) -> None:
    batch, channels, positions, groups = shape
    torch.manual_seed(positions)
    x = (3 * torch.randn(batch, channels, positions) + 1).to(on, dtype)
    weight, bias = torch.randn(2, channels).to(on, weight_dtype)
    out = torch.full_like(x, torch.nan)
    assert group_norm(x, groups, weight, bias, 1e-5, silu=silu, out=out) is out
    expected = group_norm_reference(x.double(), groups, weight.double(), bias.double(), 1e-5, silu=silu)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert group_norm(x, groups, weight, bias, 1e-5, silu=silu, out=x) is x
    assert torch.equal(x, out)


@SILU
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(on: str, shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool) -> None:
    check(on, shape, dtype, torch.float32 if silu else dtype, silu)


@pytest.mark.slow
@SILU
@DTYPES
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("on", ["c", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
def test_matches_the_reference_at_the_sizes_of_images(
    on: str, shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool
) -> None:
    check(on, shape, dtype, dtype, silu)


@pytest.mark.parametrize("positions", [33, 9001])
def test_a_large_mean_costs_no_variance(on: str, positions: int) -> None:
    torch.manual_seed(positions)
    x = (1000 + torch.randn(1, 4, positions)).to(on)
    weight, bias = torch.ones(4, device=on), torch.zeros(4, device=on)
    expected = group_norm_reference(x.double(), 2, weight.double(), bias.double(), 1e-5)
    # the mean's own rounding remains, units of 6e-5; E[x^2] - E[x]^2 would be wrong by some percent
    torch.testing.assert_close(group_norm(x, 2, weight, bias, 1e-5).double(), expected, atol=3e-4, rtol=1e-5)


@SILU
@DTYPES
def test_a_group_keeps_its_bits_among_others(on: str, dtype: torch.dtype, silu: bool) -> None:
    x, (weight, bias) = torch.randn(2, 12, 77).to(on, dtype), torch.randn(2, 12).to(on, dtype)
    whole = group_norm(x, 4, weight, bias, 1e-5, silu=silu)
    assert torch.equal(group_norm(x[1:2], 4, weight, bias, 1e-5, silu=silu), whole[1:2])
    part = x[:, 3:9].contiguous()
    assert torch.equal(group_norm(part, 2, weight[3:9], bias[3:9], 1e-5, silu=silu), whole[:, 3:9])


@SILU
@DTYPES
def test_a_group_keeps_its_bits_on_any_number_of_threads(dtype: torch.dtype, silu: bool) -> None:
    x, (weight, bias) = torch.randn(2, 64, 1031).to(dtype), torch.randn(2, 64).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = group_norm(x, 32, weight, bias, 1e-5, silu=silu)
        torch.set_num_threads(2)
        assert torch.equal(group_norm(x, 32, weight, bias, 1e-5, silu=silu), whole)
    finally:
        torch.set_num_threads(before)


def test_a_replay_normalises_the_image_of_the_moment() -> None:
    x, (weight, bias) = torch.zeros(2, 6, 50), torch.randn(2, 6)
    out = torch.full_like(x, torch.nan)
    with record() as replay:
        group_norm(x, 3, weight, bias, 1e-5, silu=True, out=out)
    x.normal_()
    replay()
    assert torch.equal(out, group_norm(x, 3, weight, bias, 1e-5, silu=True))


def test_no_images_and_no_positions_are_no_work(on: str) -> None:
    weight = torch.ones(4, device=on)
    for shape in ((0, 4, 9), (2, 4, 0)):
        assert group_norm(torch.empty(shape, device=on), 2, weight, weight, 1e-5).shape == shape


def test_broken_contracts_are_refused() -> None:
    x, weight, bias = torch.randn(2, 6, 5), torch.ones(6), torch.zeros(6)
    with pytest.raises(ValueError, match="x must be contiguous"):
        group_norm(x.transpose(1, 2), 3, weight, bias, 1e-5)
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16"):
        group_norm(x[0], 3, weight, bias, 1e-5)
    for groups in (0, 4, -2):
        with pytest.raises(ValueError, match=f"groups must divide x's 6 channels, got {groups}"):
            group_norm(x, groups, weight, bias, 1e-5)
    with pytest.raises(ValueError, match="weight must be"):
        group_norm(x, 3, weight[:3], bias, 1e-5)
    with pytest.raises(ValueError, match="bias must be"):
        group_norm(x, 3, weight, bias.double(), 1e-5)
    with pytest.raises(ValueError, match="out must be"):
        group_norm(x, 3, weight, bias, 1e-5, out=x[:1])
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        group_norm(x.to("meta"), 3, weight, bias, 1e-5)
