"""The residual addition: a program for each 1,024 elements."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _add(x, residual, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < count
    total = tl.load(x + at, within).to(tl.float32) + tl.load(residual + at, within).to(tl.float32)
    tl.store(out + at, narrow(total, out.dtype.element_ty), within)


def add(x: Tensor, residual: Tensor, out: Tensor) -> None:
    """Of checked tensors."""
    launch(_add, (triton.cdiv(x.numel(), _BLOCK),), x, residual, out, x.numel(), BLOCK=_BLOCK)


def variants(capability: int) -> list[Variant]:
    """One for each dtype."""
    return [
        Variant(
            name=f"add {dtype}",
            kernel=_add,
            arguments={"x": f"*{dtype}", "residual": f"*{dtype}", "out": f"*{dtype}", "count": "i64"},
            constants={"BLOCK": _BLOCK},
        )
        for dtype in ("bf16", "fp32")
    ]
