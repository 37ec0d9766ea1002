"""Gated activations of a fused gate-and-up projection.

    gated_silu:      y = gate * sigmoid(gate) * up
    gated_gelu_tanh: y = gelu(gate) * up,  gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))

gate_up  [rows, 2 * width], gate in the first half of a row and up in the second, contiguous, float32 or bfloat16
y        [rows, width]

float32 inside, rounded once at the end. Each element depends on its own gate and up alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SILU, _GELU_TANH = 0, 1


def gated_silu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up (SwiGLU) -> [rows, width]. Raises ValueError when a tensor breaks the contract."""
    return _launch(gate_up, _SILU, out)


def gated_gelu_tanh(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu_tanh(gate) * up (GeGLU) -> [rows, width]. Raises ValueError when a tensor breaks the contract."""
    return _launch(gate_up, _GELU_TANH, out)


def gated_silu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in plain torch, in the dtype of its input."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def gated_gelu_tanh_reference(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in plain torch, in the dtype of its input."""
    gate, up = gate_up.chunk(2, -1)
    return functional.gelu(gate, approximate="tanh") * up


def _launch(gate_up: Tensor, activation: int, out: Tensor | None) -> Tensor:
    if gate_up.device.type != "cpu":
        raise ValueError(f"gated activations run on: cpu; got a tensor on {gate_up.device}")
    dtype = gate_up.dtype
    if dtype not in _DTYPES or gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up must be contiguous float32 or bfloat16 [rows, 2 * width], got {dtype} {list(gate_up.shape)}"
        )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(rows, width, dtype=dtype)
    elif out.dtype != dtype or out.shape != (rows, width) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {dtype} [{rows}, {width}], got {out.dtype} {list(out.shape)}")
    library.call(
        "tandem_gated_activation",
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        _DTYPES[dtype],
        activation,
        torch.get_num_threads(),
    )
    return out
