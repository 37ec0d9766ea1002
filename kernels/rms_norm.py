"""RMSNorm, alone or fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight            (Zhang and Sennrich 2019, arXiv:1910.07467)

x, residual, y   [rows, width], contiguous, float32, bfloat16 or float16
weight           [width], x's dtype or float32

float32 inside, rounded once at the end. A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """RMSNorm of each row of x -> y of x's shape and dtype. Raises ValueError when a tensor breaks the contract."""
    _check(x, weight)
    if out is None:
        out = torch.empty_like(x)
    else:
        _check_same("out", out, x)
    _launch(x, None, weight, eps, out, None)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """new_residual = x + residual, y = RMSNorm(new_residual) -> (y, new_residual), both of x's shape and dtype.

    The norm reads new_residual as rounded to x's dtype. `residual_out` may be `residual` itself, to add in place.
    Raises ValueError when a tensor breaks the contract.
    """
    _check(x, weight)
    _check_same("residual", residual, x)
    if out is None:
        out = torch.empty_like(x)
    else:
        _check_same("out", out, x)
    if residual_out is None:
        residual_out = torch.empty_like(x)
    else:
        _check_same("residual_out", residual_out, x)
    _launch(x, residual, weight, eps, out, residual_out)
    return out, residual_out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in plain torch, in the dtype of its inputs."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm in plain torch, in the dtype of its inputs."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor | None
) -> None:
    if in_triton("rms_norm", x):
        from kernels.cuda.rms_norm import rms_norm as launch

        launch(x, residual, weight, eps, out, residual_out)
        return
    rows, width = x.shape
    library.call("tandem_rms_norm",
        x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
        out.data_ptr(), None if residual_out is None else residual_out.data_ptr(),
        rows, width, float(eps), CODES[x.dtype], CODES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, width], got {x.dtype} {list(x.shape)}"
        )
    if weight.dtype not in (x.dtype, torch.float32) or weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous {x.dtype} or float32 [{x.shape[1]}], got {weight.dtype} {list(weight.shape)}"
        )


def _check_same(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype or tensor.shape != x.shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {x.dtype} {list(x.shape)} like x, got {tensor.dtype} {list(tensor.shape)}"
        )
