"""LayerNorm: a program for each row, all of it in registers, so that the second pass reads no memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant


@triton.jit
def _layer_norm(
    x, residual, weight, bias, out, residual_out, width, eps,
    WIDTH: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, WIDTH)
    within = columns < width
    value = tl.load(x + row + columns, within, other=0.0)
    if ADDS:
        total = value.to(tl.float32) + tl.load(residual + row + columns, within, other=0.0).to(tl.float32)
        value = narrow(total, value.dtype)
        tl.store(residual_out + row + columns, value, within)
    value = value.to(tl.float32)
    mean = tl.sum(value) / width
    difference = tl.where(within, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(difference * difference) / width + eps)
    scaled = difference * inverse * tl.load(weight + columns, within, other=0.0).to(tl.float32)
    if BIASED:
        scaled += tl.load(bias + columns, within, other=0.0).to(tl.float32)
    tl.store(out + row + columns, narrow(scaled, out.dtype.element_ty), within)


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    residual_out: Tensor | None,
) -> None:
    """Without a residual: of x alone."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    constants = {"WIDTH": block, "ADDS": residual is not None, "BIASED": bias is not None}
    arguments = (x, residual, weight, bias, out, residual_out, width, eps)
    launch(_layer_norm, (rows,), *arguments, **constants, num_warps=_num_warps(block))


def variants(capability: int) -> list[Variant]:
    """Widths as small models have, as 8B ones, and the widest."""
    return [
        Variant(
            name=f"{'add_' if adds else ''}layer_norm {dtype} {block}{' biased' if biased else ''}",
            kernel=_layer_norm,
            arguments={
                "x": f"*{dtype}",
                "residual": f"*{dtype}",
                "weight": f"*{dtype}",
                "bias": f"*{dtype}",
                "out": f"*{dtype}",
                "residual_out": f"*{dtype}",
                "width": "i32",
                "eps": "fp32",
            },
            constants={"WIDTH": block, "ADDS": adds, "BIASED": biased},
            aligned=("width",),
            num_warps=_num_warps(block),
        )
        for dtype in ("bf16", "fp32")
        for block in (1024, 4096, 16384)
        for adds in (False, True)
        for biased in (False, True)
    ]


def _num_warps(block: int) -> int:
    """At most 16 elements for each thread up to 8192."""
    return min(max(block // 512, 1), 16)
