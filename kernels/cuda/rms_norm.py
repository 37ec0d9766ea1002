"""RMSNorm: a program for each row, all of it in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant


@triton.jit
def _rms_norm(x, residual, weight, out, residual_out, width, eps, WIDTH: tl.constexpr, ADDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, WIDTH)
    within = columns < width
    value = tl.load(x + row + columns, within, other=0.0)
    if ADDS:
        total = value.to(tl.float32) + tl.load(residual + row + columns, within, other=0.0).to(tl.float32)
        value = narrow(total, value.dtype)
        tl.store(residual_out + row + columns, value, within)
    value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value) / width + eps)
    scaled = value * inverse * tl.load(weight + columns, within, other=0.0).to(tl.float32)
    tl.store(out + row + columns, narrow(scaled, out.dtype.element_ty), within)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor | None
) -> None:
    """Without a residual: of x alone."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    constants = {"WIDTH": block, "ADDS": residual is not None}
    arguments = (x, residual, weight, out, residual_out, width, eps)
    launch(_rms_norm, (rows,), *arguments, **constants, num_warps=_num_warps(block))


def variants(capability: int) -> list[Variant]:
    """SmolLM2's width, Llama-3.1-8B's, and the widest."""
    return [
        Variant(
            name=f"{'add_' if adds else ''}rms_norm {dtype} {block}",
            kernel=_rms_norm,
            arguments={
                "x": f"*{dtype}",
                "residual": f"*{dtype}",
                "weight": f"*{dtype}",
                "out": f"*{dtype}",
                "residual_out": f"*{dtype}",
                "width": "i32",
                "eps": "fp32",
            },
            constants={"WIDTH": block, "ADDS": adds},
            aligned=("width",),
            num_warps=_num_warps(block),
        )
        for dtype in ("bf16", "fp32")
        for block in (1024, 4096, 16384)
        for adds in (False, True)
    ]


def _num_warps(block: int) -> int:
    """At most 16 elements for each thread up to 8192."""
    return min(max(block // 512, 1), 16)
