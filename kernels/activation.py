"""Activations: gated, of a fused gate-and-up projection, and plain, with the bias of the projection before them.

    gated:     y = f(gate) * up
    activate:  y = f(x + bias)

    silu        f(g) = g * sigmoid(g)
    gelu_tanh   f(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))
    gelu        f(g) = g / 2 * (1 + erf(g / sqrt(2)))
    relu        f(g) = max(g, 0)
    quick_gelu  f(g) = g * sigmoid(1.702 g)

gate_up  [rows, 2 * width], gate in the first half of a row and up in the second, contiguous, of x's dtypes
x        [rows, width], contiguous, float32, bfloat16 or float16
bias     [width], x's dtype or float32
y        [rows, width]

float32 inside, rounded once at the end. Each element depends on its own inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES

KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "quick_gelu": 4}  # as kernels/cpu/activation.c numbers them


def gated(gate_up: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """f(gate) * up -> [rows, width], f by its name: with silu SwiGLU, with gelu or gelu_tanh GeGLU, with relu ReGLU.

    Raises ValueError for another name or when a tensor breaks the contract.
    """
    _check_kind(kind)
    triton = in_triton("gated", gate_up)
    dtype = gate_up.dtype
    if dtype not in CODES or gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up must be contiguous float32, bfloat16 or float16 [rows, 2 * width], "
            f"got {dtype} {list(gate_up.shape)}"
        )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _output(out, gate_up, rows, width)
    if triton:
        from kernels.cuda.activation import gated as launch

        launch(gate_up, out, kind)
        return out
    library.call("tandem_gated_activation",
        gate_up.data_ptr(), out.data_ptr(), rows, width, CODES[dtype], KINDS[kind], torch.get_num_threads(),
    )  # fmt: skip
    return out


def activate(x: Tensor, kind: str, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """f(x + bias) -> [rows, width], f by its name.

    `out` may be x itself, to compute in place. Raises ValueError for another name or when a tensor breaks the contract.
    """
    _check_kind(kind)
    triton = in_triton("activate", x)
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, width], got {x.dtype} {list(x.shape)}"
        )
    rows, width = x.shape
    if bias is not None and (
        bias.dtype not in (x.dtype, torch.float32) or bias.shape != (width,) or not bias.is_contiguous()
    ):
        raise ValueError(f"bias must be contiguous {x.dtype} or float32 [{width}], got {bias.dtype} {list(bias.shape)}")
    out = _output(out, x, rows, width)
    if triton:
        from kernels.cuda.activation import activate as launch

        launch(x, bias, out, kind)
        return out
    library.call("tandem_activation",
        x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), rows, width, CODES[x.dtype],
        0 if bias is None else CODES[bias.dtype], KINDS[kind], torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_reference(gate_up: Tensor, kind: str) -> Tensor:
    """f(gate) * up in plain torch, in the dtype of its input."""
    gate, up = gate_up.chunk(2, -1)
    return activate_reference(gate, kind) * up


def activate_reference(x: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """f(x + bias) in plain torch, in the dtype of its inputs."""
    biased = x if bias is None else x + bias
    if kind == "gelu_tanh":
        return functional.gelu(biased, approximate="tanh")
    if kind == "quick_gelu":
        return biased * (1.702 * biased).sigmoid()
    return {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}[kind](biased)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _output(out: Tensor | None, x: Tensor, rows: int, width: int) -> Tensor:
    if out is None:
        return x.new_empty(rows, width)
    if out.dtype != x.dtype or out.shape != (rows, width) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {x.dtype} [{rows}, {width}], got {out.dtype} {list(out.shape)}")
    return out
