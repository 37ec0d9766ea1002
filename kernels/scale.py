"""Numbers scaled, capped softly and clipped: of logits, and of projections that a model keeps within bounds.

    y = clamp(soft_cap * tanh(factor * x / soft_cap), -clip, clip)

x, y   [rows, width], contiguous, float32, bfloat16 or float16

A part that is not given is left out: without soft_cap y = clamp(factor * x, -clip, clip). float32 inside, rounded once
at the end; NaN stays NaN. Each element depends on itself alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def scale(
    x: Tensor,
    factor: float = 1.0,
    *,
    soft_cap: float | None = None,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y of x's shape and dtype. `out` may be x itself, to compute in place.

    Raises ValueError when a tensor breaks the contract, for a factor that is not finite, and for a soft_cap or clip
    that is not finite and above 0.
    """
    triton = in_triton("scale", x)
    if x.dtype not in CODES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [rows, width], got {x.dtype} {list(x.shape)}"
        )
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")
    for name, bound in (("soft_cap", soft_cap), ("clip", clip)):
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {bound}")
    if out is None:
        out = torch.empty_like(x)
    elif out.dtype != x.dtype or out.shape != x.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {x.dtype} {list(x.shape)} like x, got {out.dtype} {list(out.shape)}")
    if soft_cap is not None:
        factor /= soft_cap  # what the tanh is of
    if triton:
        from kernels.cuda.scale import scale as launch

        launch(x, float(factor), soft_cap, clip, out)
        return out
    library.call("tandem_scale",
        x.data_ptr(), out.data_ptr(), x.numel(), float(factor), float(soft_cap or 0), float(clip or 0),
        CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def scale_reference(
    x: Tensor, factor: float = 1.0, *, soft_cap: float | None = None, clip: float | None = None
) -> Tensor:
    """The same in plain torch, in the dtype of its input."""
    y = factor * x
    if soft_cap is not None:
        y = soft_cap * (y / soft_cap).tanh()
    return y if clip is None else y.clamp(-clip, clip)
