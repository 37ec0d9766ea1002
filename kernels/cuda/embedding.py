"""The embedding of tokens: a program for each part of a row, of BLOCK columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.gather import gather
from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant

_BLOCK = 1024  # 16 bytes of bfloat16 for each thread of four warps


@triton.jit
def _part(table, row, num_rows, columns, width):
    """float32 columns of a row of a table, zeros of one that it does not have."""
    readable = tl.where((row >= 0) & (row < num_rows), width, 0)
    return tl.load(table + row * width + columns, columns < readable, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_types", "offset"])
def _embed(
    table, token_ids, position_table, positions, type_table, token_types, out,
    num_tokens, num_positions, num_types, offset, width, scale,
    POSITIONED: tl.constexpr, TYPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _part(table, tl.load(token_ids + index), num_tokens, columns, width) * scale
    if POSITIONED:
        position = tl.load(positions + index).to(tl.int64) + offset
        value += _part(position_table, position, num_positions, columns, width)
    if TYPED:
        value += _part(type_table, tl.load(token_types + index), num_types, columns, width)
    tl.store(out + index * width + columns, narrow(value, out.dtype.element_ty), columns < width)


def embed(
    table: Tensor,
    token_ids: Tensor,
    scale: float,
    positions: Tensor | None,
    position_table: Tensor | None,
    offset: int,
    token_types: Tensor | None,
    type_table: Tensor | None,
    out: Tensor,
) -> None:
    """Of an index out of range, its part is zeros."""
    if scale == 1.0 and position_table is None and type_table is None:
        gather(table, token_ids, out)
        return
    width = table.shape[1]
    arguments = (
        table, token_ids, position_table, positions, type_table, token_types, out, table.shape[0],
        0 if position_table is None else position_table.shape[0], 0 if type_table is None else type_table.shape[0],
        offset, width, scale,
    )  # fmt: skip
    constants = {"POSITIONED": position_table is not None, "TYPED": type_table is not None, "BLOCK": _BLOCK}
    launch(_embed, (token_ids.shape[0], triton.cdiv(width, _BLOCK)), *arguments, **constants)


def variants(capability: int) -> list[Variant]:
    """Scaled tokens, tokens with positions, and with types too, of any width that is a multiple of 16."""
    return [
        Variant(
            name=f"embed {dtype}{' positions' if positioned else ''}{' types' if typed else ''}",
            kernel=_embed,
            arguments={
                "table": f"*{dtype}",
                "token_ids": "*i64",
                "position_table": f"*{dtype}",
                "positions": "*i32",
                "type_table": f"*{dtype}",
                "token_types": "*i64",
                "out": f"*{dtype}",
                **dict.fromkeys(("num_tokens", "num_positions", "num_types", "offset", "width"), "i32"),
                "scale": "fp32",
            },
            constants={"POSITIONED": positioned, "TYPED": typed, "BLOCK": _BLOCK},
            aligned=("width",),
        )
        for dtype in ("bf16", "fp32")
        for positioned, typed in ((False, False), (True, False), (True, True))
    ]
