"""The residual addition where no norm follows it.

    y = x + residual

x, residual, y   [rows, width], contiguous, float32, bfloat16 or float16

float32 inside, rounded once. Each element depends on its own inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def add(x: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + residual -> [rows, width]. `out` may be either of them.

    Raises ValueError when a tensor breaks the contract.
    """
    triton = in_triton("add", x)
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, width], got {x.dtype} {list(x.shape)}"
        )
    if out is None:
        out = torch.empty_like(x)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor.dtype != x.dtype or tensor.shape != x.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x.dtype} {list(x.shape)} like x, got {tensor.dtype} {list(tensor.shape)}"
            )
    if triton:
        from kernels.cuda.add import add as launch

        launch(x, residual, out)
        return out
    library.call(
        "tandem_add",
        x.data_ptr(), residual.data_ptr(), out.data_ptr(), *x.shape, CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_reference(x: Tensor, residual: Tensor) -> Tensor:
    """The same in plain torch, in the dtype of its inputs."""
    return x + residual
