"""What kernels share: their launch, and the two operations that Triton's interpreter (3.9) gets wrong in bfloat16."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernels import device

_INTERPRETED = tl.constexpr(device.INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **more: Any):
    """Runs a kernel on the current stream; an empty grid is nothing to do. more: arguments by name, constants too."""
    if all(grid):
        kernel[grid](*arguments, **more, num_warps=num_warps, num_stages=num_stages)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, products and sums in float32 (IEEE for float32 operands), or in int32 for int8."""
    if _INTERPRETED and a.dtype.is_floating():  # it multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to a dtype, to the nearest and of two to the even one."""
    if _INTERPRETED and dtype == tl.bfloat16:  # it cuts bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(x == x, (bits >> 16).to(tl.uint16), 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
