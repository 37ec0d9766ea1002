"""Activations, gated and plain: a program for each part of a row, of BLOCK columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import KINDS
from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant

_BLOCK = 1024  # 16 bytes of bfloat16 for each thread of four warps


@triton.jit
def sigmoid(z):
    """Of float32."""
    return 1.0 / (1.0 + tl.exp(tl.where(z < -87.0, 87.0, -z)))  # beyond it, e^-z is infinite


@triton.jit
def _gelu(g):
    """max(g, 0) - |g| * Phi(-|g|), in the form and with the coefficients of kernels/cpu/activation.c."""
    size = tl.abs(g)
    t = 1.0 / tl.fma(size, 0.4, 1.0)
    p = tl.fma(t, 0.0320987329, -0.176180496)
    p = tl.fma(p, t, 0.380798089)
    p = tl.fma(p, t, -0.371989903)
    p = tl.fma(p, t, 0.117760186)
    p = tl.fma(p, t, -0.0258983448)
    p = tl.fma(p, t, 0.0910063595)
    p = tl.fma(p, t, 0.133209851)
    p = tl.fma(p, t, 0.159619233)
    p = tl.fma(p, t, 0.1595763)
    return tl.where(g < 0.0, 0.0, g) - size * (tl.exp(-0.5 * g * g) * t * p)


@triton.jit
def _activated(g, KIND: tl.constexpr):
    if KIND == "silu":
        return g * sigmoid(g)
    elif KIND == "quick_gelu":
        return g * sigmoid(1.702 * g)
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        return g * sigmoid(1.5957691216057308 * (g + 0.044715 * (g * g * g)))
    elif KIND == "gelu":
        return _gelu(g)
    else:
        return tl.where(g < 0.0, 0.0, g)


@triton.jit
def _gated(gate_up, out, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < width
    gate = tl.load(gate_up + 2 * row + columns, within, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + columns, within, other=0.0).to(tl.float32)
    tl.store(out + row + columns, narrow(_activated(gate, KIND) * up, out.dtype.element_ty), within)


@triton.jit
def _plain(x, bias, out, width, KIND: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < width
    value = tl.load(x + row + columns, within, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + columns, within, other=0.0).to(tl.float32)
    tl.store(out + row + columns, narrow(_activated(value, KIND), out.dtype.element_ty), within)


def gated(gate_up: Tensor, out: Tensor, kind: str) -> None:
    """f(gate) * up."""
    rows, width = out.shape
    launch(_gated, (rows, triton.cdiv(width, _BLOCK)), gate_up, out, width, KIND=kind, BLOCK=_BLOCK)


def activate(x: Tensor, bias: Tensor | None, out: Tensor, kind: str) -> None:
    """f(x + bias)."""
    rows, width = x.shape
    constants = {"KIND": kind, "BIASED": bias is not None, "BLOCK": _BLOCK}
    launch(_plain, (rows, triton.cdiv(width, _BLOCK)), x, bias, out, width, **constants)


def variants(capability: int) -> list[Variant]:
    """The same for any width that is a multiple of 16."""
    gated_ones = [
        Variant(
            name=f"gated {kind} {dtype}",
            kernel=_gated,
            arguments={"gate_up": f"*{dtype}", "out": f"*{dtype}", "width": "i32"},
            constants={"KIND": kind, "BLOCK": _BLOCK},
            aligned=("width",),
        )
        for dtype in ("bf16", "fp32")
        for kind in KINDS
    ]
    return gated_ones + [
        Variant(
            name=f"activate {kind} {dtype}{' biased' if biased else ''}",
            kernel=_plain,
            arguments={"x": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}", "width": "i32"},
            constants={"KIND": kind, "BIASED": biased, "BLOCK": _BLOCK},
            aligned=("width",),
        )
        for dtype in ("bf16", "fp32")
        for kind in KINDS
        for biased in (False, True)
    ]
