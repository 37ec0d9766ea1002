"""Scaled, capped and clipped numbers: a program for each part of a row, of BLOCK columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant

_BLOCK = 1024  # 16 bytes of bfloat16 for each thread of four warps


@triton.jit
def _tanh(x):
    """In the form and with the coefficients of kernels/cpu/simd.h."""
    size = tl.abs(x)
    size = tl.where(size > 10.0, 10.0, size)  # from there on it is 1, and nothing overflows
    square = size * size
    p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, square, -5.37397155531e-2)
    p = tl.fma(p, square, 1.33314422036e-1)
    p = tl.fma(p, square, -3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    y = tl.where(size < 0.625, tl.fma(p * square, size, size), far)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _scale(x, out, width, factor, cap, clip, CAPS: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < width
    value = tl.load(x + row + columns, within, other=0.0).to(tl.float32) * factor
    if CAPS:
        value = cap * _tanh(value)
    if CLIPS:  # a NaN is neither above nor below
        value = tl.where(value > clip, clip, tl.where(value < -clip, -clip, value))
    tl.store(out + row + columns, narrow(value, out.dtype.element_ty), within)


def scale(x: Tensor, factor: float, soft_cap: float | None, clip: float | None, out: Tensor) -> None:
    """factor: divided by the cap, where there is one."""
    rows, width = x.shape
    constants = {"CAPS": soft_cap is not None, "CLIPS": clip is not None, "BLOCK": _BLOCK}
    arguments = (x, out, width, factor, float(soft_cap or 0), float(clip or 0))
    launch(_scale, (rows, triton.cdiv(width, _BLOCK)), *arguments, **constants)


def variants(capability: int) -> list[Variant]:
    """Scaled alone, capped, and clipped, of any width that is a multiple of 16."""
    return [
        Variant(
            name=f"scale {dtype}{' capped' if caps else ''}{' clipped' if clips else ''}",
            kernel=_scale,
            arguments={
                "x": f"*{dtype}",
                "out": f"*{dtype}",
                "width": "i32",
                **dict.fromkeys(("factor", "cap", "clip"), "fp32"),
            },
            constants={"CAPS": caps, "CLIPS": clips, "BLOCK": _BLOCK},
            aligned=("width",),
        )
        for dtype in ("bf16", "fp32")
        for caps, clips in ((False, False), (True, False), (False, True))
    ]
