"""Rows of a table: a program for each part of a row, of BLOCK elements, whose bits are copied as integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch
from kernels.cuda.variant import Variant

_BLOCK = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes; what is wider is so many of 8


@triton.jit(do_not_specialize=["num_rows"])
def _gather(table, rows, out, num_rows, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + index)
    readable = tl.where((row >= 0) & (row < num_rows), width, 0)
    value = tl.load(table + row * width + columns, columns < readable, other=0)
    tl.store(out + index * width + columns, value, columns < width)


def gather(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """A row out of range is zeros."""
    integer = _INTEGERS.get(table.element_size(), torch.int64)
    table, out = table.view(integer), out.view(integer)
    width = table.shape[1]
    grid = (rows.shape[0], triton.cdiv(width, _BLOCK))
    launch(_gather, grid, table, rows, out, table.shape[0], width, BLOCK=_BLOCK)


def variants(capability: int) -> list[Variant]:
    """Tables of 16 and of 32 bits, of any width that is a multiple of 16."""
    return [
        Variant(
            name=f"gather {dtype}",
            kernel=_gather,
            arguments={
                "table": f"*{dtype}", "rows": "*i64", "out": f"*{dtype}", "num_rows": "i32", "width": "i32",
            },
            constants={"BLOCK": _BLOCK},
            aligned=("width",),
        )
        for dtype in ("i16", "i32")
    ]  # fmt: skip
