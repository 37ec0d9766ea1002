"""Norms of heads in place: a program for each row and each few of its heads, all of them in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant


@triton.jit
def _head_norm(
    x, weight, bias, eps, total, first, num_heads, width,
    KIND: tl.constexpr, OWN: tl.constexpr, BIASED: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    heads = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[:, None]
    columns = heads * width + tl.arange(0, WIDTH)[None, :]
    within = (heads < num_heads) & (tl.arange(0, WIDTH) < width)[None, :]
    row = tl.program_id(0).to(tl.int64) * total + first
    value = tl.load(x + row + columns, within, other=0.0).to(tl.float32)
    if KIND == "layer":
        value = tl.where(within, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / width + eps)
    own = columns if OWN else columns - heads * width
    scaled = value * inverse[:, None] * tl.load(weight + own, within, other=0.0).to(tl.float32)
    if BIASED:
        scaled += tl.load(bias + own, within, other=0.0).to(tl.float32)
    tl.store(x + row + columns, narrow(scaled, x.dtype.element_ty), within)


def head_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, first: int, num_heads: int, width: int
) -> None:
    """In place."""
    rows, total = x.shape
    constants = _constants(kind, weight.shape[0] != width, bias is not None, num_heads, width)
    grid = (rows, triton.cdiv(num_heads, constants["GROUP"]))
    arguments = (x, weight, bias, eps, total, first, num_heads, width)
    launch(_head_norm, grid, *arguments, **constants, num_warps=_num_warps(constants))


def variants(capability: int) -> list[Variant]:
    """Weights of each head, and of whole projections, at SmolLM2-135M's and Llama-3.1-8B's shapes."""
    shapes = (
        ("rms 1x576", "rms", 1, 576),
        ("rms 1x4096", "rms", 1, 4096),
        ("rms 32x128", "rms", 32, 128),
        ("layer 9x64 of each", "layer", 9, 64),
        ("layer 32x128 of each", "layer", 32, 128),
        ("layer 32x128 of each, biased", "layer", 32, 128),
    )
    return [
        _variant(f"{dtype} {name}", dtype, _constants(kind, "of each" in name, "biased" in name, num_heads, width))
        for dtype in ("bf16", "fp32")
        for name, kind, num_heads, width in shapes
    ]


def _variant(name: str, dtype: str, constants: dict[str, int | bool | str]) -> Variant:
    sizes = ("total", "first", "num_heads", "width")
    return Variant(
        name=f"head_norm {name}",
        kernel=_head_norm,
        arguments={
            **dict.fromkeys(("x", "weight", "bias"), f"*{dtype}"),
            "eps": "fp32",
            **dict.fromkeys(sizes, "i32"),
        },
        constants=constants,
        aligned=("total", "first", "width"),
        num_warps=_num_warps(constants),
    )


def _constants(kind: str, own: bool, biased: bool, num_heads: int, width: int) -> dict:
    """A group is of some 512 elements, of one head at least."""
    block = triton.next_power_of_2(width)
    group = min(max(512 // block, 1), triton.next_power_of_2(num_heads))
    return {"KIND": kind, "OWN": own, "BIASED": biased, "GROUP": group, "WIDTH": block}


def _num_warps(constants: dict) -> int:
    """At most 16 elements for each thread up to 8192."""
    return min(max(constants["GROUP"] * constants["WIDTH"] // 512, 1), 16)
