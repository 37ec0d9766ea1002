"""LayerNorm, alone or fused with the residual addition before it.

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias      (Ba et al. 2016, arXiv:1607.06450)

x, residual, y   [rows, width], contiguous, float32, bfloat16 or float16
weight, bias     [width], x's dtype or float32; no bias is none added

float32 inside, rounded once at the end. The variance is the mean of squared differences from a mean that is already
known: E[x^2] - E[x]^2 would lose it where the mean is large. A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
    """LayerNorm of each row of x -> y of x's shape and dtype. Raises ValueError when a tensor breaks the contract."""
    _check(x, weight, bias)
    if out is None:
        out = torch.empty_like(x)
    else:
        _check_same("out", out, x)
    _launch(x, None, weight, bias, eps, out, None)
    return out


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """new_residual = x + residual, y = LayerNorm(new_residual) -> (y, new_residual), both of x's shape and dtype.

    The norm reads new_residual as rounded to x's dtype. `residual_out` may be `residual` itself, to add in place.
    Raises ValueError when a tensor breaks the contract.
    """
    _check(x, weight, bias)
    _check_same("residual", residual, x)
    if out is None:
        out = torch.empty_like(x)
    else:
        _check_same("out", out, x)
    if residual_out is None:
        residual_out = torch.empty_like(x)
    else:
        _check_same("residual_out", residual_out, x)
    _launch(x, residual, weight, bias, eps, out, residual_out)
    return out, residual_out


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in plain torch, in the dtype of its inputs."""
    difference = x - x.mean(-1, keepdim=True)
    y = difference * torch.rsqrt(difference.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm in plain torch, in the dtype of its inputs."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    residual_out: Tensor | None,
) -> None:
    if in_triton("layer_norm", x):
        from kernels.cuda.layer_norm import layer_norm as launch

        launch(x, residual, weight, bias, eps, out, residual_out)
        return
    rows, width = x.shape
    library.call("tandem_layer_norm",
        x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        None if residual_out is None else residual_out.data_ptr(), rows, width, float(eps), CODES[x.dtype],
        CODES[weight.dtype], 0 if bias is None else CODES[bias.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, width], got {x.dtype} {list(x.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, torch.float32) or tensor.shape != x.shape[1:] or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x.dtype} or float32 [{x.shape[1]}], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


def _check_same(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype or tensor.shape != x.shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {x.dtype} {list(x.shape)} like x, got {tensor.dtype} {list(tensor.shape)}"
        )
