"""GroupNorm: a program for each group of an image, three times over it: mean, variance, and then tile by tile.

Sums are kept element by element of a part until all parts are in, so there is one order of them, and few additions in
a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.activation import sigmoid
from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant

_TILE = 4096


@triton.jit
def _group_norm(
    x, weight, bias, out, groups, channels, positions, eps,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    start = group.to(tl.int64) * channels * positions
    first = group % groups * channels
    count = channels * positions
    part: tl.constexpr = CHANNELS * POSITIONS
    elements = tl.arange(0, part)

    sums = tl.zeros([part], tl.float32)
    for i in range(0, count, part):
        sums += tl.load(x + start + i + elements, i + elements < count, other=0.0).to(tl.float32)
    mean = tl.sum(sums) / count

    squares = tl.zeros([part], tl.float32)
    for i in range(0, count, part):
        value = tl.load(x + start + i + elements, i + elements < count, other=0.0).to(tl.float32)
        difference = tl.where(i + elements < count, value - mean, 0.0)
        squares += difference * difference
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares) / count + eps)

    rows = tl.arange(0, CHANNELS)[:, None]
    columns = tl.arange(0, POSITIONS)[None, :]
    for c in range(0, channels, CHANNELS):
        scales = inverse * tl.load(weight + first + c + rows, c + rows < channels, other=0.0).to(tl.float32)
        biases = tl.load(bias + first + c + rows, c + rows < channels, other=0.0).to(tl.float32)
        for p in range(0, positions, POSITIONS):
            within = (c + rows < channels) & (p + columns < positions)
            place = start + (c + rows) * positions + (p + columns)
            value = tl.load(x + place, within, other=0.0).to(tl.float32)
            value = (value - mean) * scales + biases
            if SILU:
                value = value * sigmoid(value)
            tl.store(out + place, narrow(value, out.dtype.element_ty), within)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, out: Tensor) -> None:
    """out: x itself, or another."""
    batch, channels, positions = x.shape
    channels //= groups
    tile = _tile(channels, positions)
    constants = {"CHANNELS": tile[0], "POSITIONS": tile[1], "SILU": silu}
    arguments = (x, weight, bias, out, groups, channels, positions, eps)
    launch(_group_norm, (batch * groups,), *arguments, **constants, num_warps=_num_warps(tile))


def variants(capability: int) -> list[Variant]:
    """Stable Diffusion's: 32 groups of 320, 640 or 1280 channels, 64x64, 32x32 or 16x16 positions.

    However many channels a group has, its tiles are these, if there are enough to fill one; those of larger images
    are those of 64x64.
    """
    return [
        _variant(f"{dtype} {positions}{' silu' if silu else ''}", dtype, _tile(channels, positions), silu)
        for dtype in ("bf16", "fp32")
        for channels, positions in ((40, 256), (10, 1024), (10, 4096))
        for silu in (False, True)
    ]


def _variant(name: str, dtype: str, tile: tuple[int, int], silu: bool) -> Variant:
    return Variant(
        name=f"group_norm {name}",
        kernel=_group_norm,
        arguments={
            **dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}"),
            **dict.fromkeys(("groups", "channels", "positions"), "i32"),
            "eps": "fp32",
        },
        constants={"CHANNELS": tile[0], "POSITIONS": tile[1], "SILU": silu},
        aligned=("groups", "positions"),
        num_warps=_num_warps(tile),
    )


def _tile(channels: int, positions: int) -> tuple[int, int]:
    """Channels and positions of a tile: as much of a channel as fits, and as many channels as fit then."""
    width = min(triton.next_power_of_2(positions), _TILE)
    return min(triton.next_power_of_2(channels), _TILE // width), width


def _num_warps(tile: tuple[int, int]) -> int:
    """16 elements for each thread."""
    return max(tile[0] * tile[1] // 512, 1)
