"""Norms of heads where they lie: some columns of each row, in parts of a head's width, RMSNorm or LayerNorm of each.

    rms    y = x / sqrt(mean(x^2) + eps) * weight
    layer  y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

x       [rows, total], contiguous, float32, bfloat16 or float16; head h of a row is its columns first + h * width on
weight  [width], of all heads, or [num_heads * width], of each its own; x's dtype or float32
bias    the same; no bias is none added

A norm of a whole projection is that of one head as wide (OLMo 2). float32 inside, rounded once at the end. A head's
bits depend on that head of that row alone; on a CPU they are those of kernels/rms_norm.py and kernels/layer_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES
from kernels.layer_norm import layer_norm_reference
from kernels.rms_norm import rms_norm_reference

_KINDS = {"rms": 0, "layer": 1}


def head_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: str,
    first: int,
    num_heads: int,
    width: int,
) -> Tensor:
    """Normalises the heads in place -> x. Other columns keep their bits.

    Raises ValueError for another kind, for heads beyond a row's end, or when a tensor breaks the contract.
    """
    triton = in_triton("head_norm", x)
    _check(x, weight, bias, kind, first, num_heads, width)
    if triton:
        from kernels.cuda.head_norm import head_norm as launch

        launch(x, weight, bias, eps, kind, first, num_heads, width)
        return x
    library.call("tandem_head_norm",
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), *x.shape, first, num_heads, width,
        int(weight.shape[0] != width), float(eps), _KINDS[kind], CODES[x.dtype], CODES[weight.dtype],
        0 if bias is None else CODES[bias.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return x


def head_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: str,
    first: int,
    num_heads: int,
    width: int,
) -> Tensor:
    """The same in plain torch, in the dtype of its inputs, as a copy of x."""
    y = x.clone()
    heads = y[:, first : first + num_heads * width].unflatten(1, (num_heads, width))
    weight, bias = weight.view(-1, width), None if bias is None else bias.view(-1, width)
    if kind == "rms":
        heads.copy_(rms_norm_reference(heads, weight, eps))
    else:
        heads.copy_(layer_norm_reference(heads, weight, bias, eps))
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, first: int, num_heads: int, width: int) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "rms" and bias is not None:
        raise ValueError("bias must be None for kind 'rms': an RMSNorm adds none")
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, total], got {x.dtype} {list(x.shape)}"
        )
    total = x.shape[1]
    if first < 0 or num_heads < 1 or width < 1 or first + num_heads * width > total:
        raise ValueError(
            f"first, num_heads and width must be heads within x's {total} columns, got {first}, {num_heads}, {width}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        fits = tensor.shape in ((width,), (num_heads * width,)) and tensor.shape == weight.shape
        if tensor.dtype not in (x.dtype, torch.float32) or not fits or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x.dtype} or float32 [{width}] or [{num_heads * width}], weight and bias "
                f"alike, got {tensor.dtype} {list(tensor.shape)}"
            )
