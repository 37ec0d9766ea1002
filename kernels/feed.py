"""The tokens that a step begins with: those that the host knows, and those that the step before has just drawn.

    out[i] = drawn[sources[i]] where sources[i] >= 0, else token_ids[i]

token_ids, out   [rows] int64
sources          [rows] int32, rows of the step before, or -1
drawn            [most rows] int64, what it drew; -1, for a row without a distribution, becomes 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.device import in_triton


def feed(token_ids: Tensor, sources: Tensor, drawn: Tensor, *, out: Tensor) -> Tensor:
    """-> out. A source beyond `drawn` is the caller's mistake, and gives 0. Raises ValueError for a broken contract."""
    rows = token_ids.shape
    for name, tensor, dtype in (("token_ids", token_ids, torch.int64), ("sources", sources, torch.int32)):
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape != rows or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} {list(rows)}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("drawn", drawn), ("out", out)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [rows], got {tensor.dtype} {list(tensor.shape)}")
    if out.shape != rows:
        raise ValueError(f"out must be of {rows[0]} rows, got {list(out.shape)}")
    if in_triton("feed", token_ids):
        from kernels.cuda.feed import feed as launch

        launch(token_ids, sources, drawn, out)
        return out
    return out.copy_(feed_reference(token_ids, sources, drawn))


def feed_reference(token_ids: Tensor, sources: Tensor, drawn: Tensor) -> Tensor:
    """The same in plain torch, which is what a CPU does."""
    known = sources < len(drawn)
    fed = torch.where(known, drawn[sources.clamp(0, len(drawn) - 1).long()].clamp(min=0), 0)
    return torch.where(sources >= 0, fed, token_ids)
