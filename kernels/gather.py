"""Rows of a table by number: the embedding of tokens, and the rows whose logits are wanted.

    y[i] = table[rows[i]]

table  [n, width], contiguous, any dtype
rows   [count] int64
y      [count, width], table's dtype

On CUDA nobody waits for the values of rows: one out of range gives a row of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton


def gather(table: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """table[rows] -> [count, width].

    Raises ValueError for a tensor that breaks the contract and, on a CPU, IndexError for a row out of range.
    """
    triton = in_triton("gather", table)
    if table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"table must be contiguous [n, width], got {list(table.shape)}")
    if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int64 [count], got {rows.dtype} {list(rows.shape)}")
    shape = (rows.shape[0], table.shape[1])
    if out is None:
        out = table.new_empty(shape)
    elif out.dtype != table.dtype or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {table.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if triton:
        from kernels.cuda.gather import gather as launch

        launch(table, rows, out)
        return out
    failed = library.call(
        "tandem_gather",
        table.data_ptr(), rows.data_ptr(), out.data_ptr(), shape[0], table.shape[0], shape[1] * table.element_size(),
    )  # fmt: skip
    if failed:
        raise IndexError(f"rows[{failed - 1}] is {int(rows[failed - 1])}, and the table has {table.shape[0]} rows")
    return out


def gather_reference(table: Tensor, rows: Tensor) -> Tensor:
    """The same in plain torch."""
    return table[rows]
