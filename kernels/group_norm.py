"""GroupNorm of images, with the SiLU that follows it in diffusers' ResnetBlock2D.

    y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias         (Wu and He 2018, arXiv:1803.08494)

x, y          [batch, channels, positions], contiguous, float32, bfloat16 or float16; positions are height * width
weight, bias  [channels], x's dtype or float32

The means are over a group: channels / groups channels that lie side by side, at all positions. With SiLU, the result
is y * sigmoid(y). float32 inside, rounded once at the end, and the variance is that of differences from a known mean,
as in kernels/layer_norm.py. A group's bits depend on that group alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y of x's shape and dtype. `out` may be x itself, to compute in place.

    Raises ValueError when the groups do not divide the channels, or a tensor breaks the contract.
    """
    triton = in_triton("group_norm", x)
    if x.dtype not in CODES or x.dim() != 3 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [batch, channels, positions], "
            f"got {x.dtype} {list(x.shape)}"
        )
    batch, channels, positions = x.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide x's {channels} channels, got {groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype not in (x.dtype, torch.float32) or tensor.shape != (channels,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {x.dtype} or float32 [{channels}], got {tensor.dtype} {list(tensor.shape)}"
            )
    if out is None:
        out = torch.empty_like(x)
    elif out.dtype != x.dtype or out.shape != x.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {x.dtype} {list(x.shape)} like x, got {out.dtype} {list(out.shape)}")
    if not x.numel():
        return out
    if triton:
        from kernels.cuda.group_norm import group_norm as launch

        launch(x, groups, weight, bias, eps, silu, out)
        return out
    library.call("tandem_group_norm",
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), batch, groups, channels // groups, positions,
        float(eps), int(silu), CODES[x.dtype], CODES[weight.dtype], CODES[bias.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = False
) -> Tensor:
    """The same in plain torch, in the dtype of its inputs."""
    y = functional.group_norm(x, groups, weight, bias, eps)
    return functional.silu(y) if silu else y
