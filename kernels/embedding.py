"""The embedding of tokens: rows of a table, scaled, with those of their positions and of their types added.

    y[i] = scale * table[token_ids[i]] + position_table[positions[i] + offset] + type_table[token_types[i]]

    table           [n, width], contiguous, float32, bfloat16 or float16
    token_ids       [rows] int64
    position_table  [m, width], table's dtype; positions [rows] int32, offset is where position 0 lies (OPT: 2)
    type_table      [k, width], table's dtype; token_types [rows] int64
    y               [rows, width], table's dtype

Summed in this order, float32 inside, rounded once at the end; a part that is not given is left out, and of the table
alone, at scale 1, every bit is copied. A row depends on its own indices alone.

On CUDA nobody waits for the values of indices: of one out of range, its part is zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES


def embed(
    table: Tensor,
    token_ids: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    token_types: Tensor | None = None,
    type_table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Embedded tokens -> [rows, width], as the module says; indices come with their table.

    Raises ValueError for a tensor that breaks the contract and, on a CPU, IndexError, with nothing written, for an
    index out of range.
    """
    triton = in_triton("embed", table)
    if table.dtype not in CODES or table.dim() != 2 or not table.is_contiguous():
        raise ValueError(
            f"table must be contiguous float32, bfloat16 or float16 [n, width], got {table.dtype} {_shape(table)}"
        )
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous int64 [rows], got {token_ids.dtype} {_shape(token_ids)}")
    rows, width = token_ids.shape[0], table.shape[1]
    _check_part(table, rows, "positions", positions, torch.int32, "position_table", position_table)
    _check_part(table, rows, "token_types", token_types, torch.int64, "type_table", type_table)
    if out is None:
        out = table.new_empty(rows, width)
    elif out.dtype != table.dtype or out.shape != (rows, width) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {table.dtype} [{rows}, {width}], got {out.dtype} {_shape(out)}")
    if triton:
        from kernels.cuda.embedding import embed as launch

        launch(table, token_ids, float(scale), positions, position_table, offset, token_types, type_table, out)
        return out
    num_positions = 0 if position_table is None else position_table.shape[0]
    num_types = 0 if type_table is None else type_table.shape[0]
    failed = library.call("tandem_embed",
        table.data_ptr(), token_ids.data_ptr(), _pointer(position_table), _pointer(positions), _pointer(type_table),
        _pointer(token_types), out.data_ptr(), rows, width, table.shape[0], num_positions, num_types, offset,
        float(scale), CODES[table.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        part, row = divmod(failed - 1, rows)
        if part == 1 and positions is not None:
            raise IndexError(
                f"positions[{row}] is {int(positions[row])}, and from the offset {offset} on the position_table has "
                f"{num_positions - offset} rows"
            )
        if part == 2 and token_types is not None:
            raise IndexError(f"token_types[{row}] is {int(token_types[row])}, and the type_table has {num_types} rows")
        raise IndexError(f"token_ids[{row}] is {int(token_ids[row])}, and the table has {table.shape[0]} rows")
    return out


def embed_reference(
    table: Tensor,
    token_ids: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    token_types: Tensor | None = None,
    type_table: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, in the dtype of the tables."""
    y = scale * table[token_ids]
    if positions is not None and position_table is not None:
        y = y + position_table[positions.long() + offset]
    if token_types is not None and type_table is not None:
        y = y + type_table[token_types]
    return y


def _check_part(
    table: Tensor,
    rows: int,
    indices_name: str,
    indices: Tensor | None,
    indices_dtype: torch.dtype,
    part_name: str,
    part: Tensor | None,
) -> None:
    if indices is None and part is None:
        return
    if indices is None or part is None:
        raise ValueError(f"{indices_name} and {part_name} come together")
    if indices.dtype != indices_dtype or indices.shape != (rows,) or not indices.is_contiguous():
        raise ValueError(
            f"{indices_name} must be contiguous {indices_dtype} [{rows}], got {indices.dtype} {_shape(indices)}"
        )
    if part.dtype != table.dtype or part.dim() != 2 or part.shape[1] != table.shape[1] or not part.is_contiguous():
        raise ValueError(
            f"{part_name} must be contiguous {table.dtype} [n, {table.shape[1]}] like table, "
            f"got {part.dtype} {_shape(part)}"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
