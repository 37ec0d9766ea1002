"""KV rows of tokens from the blocks of one pool to those of another, of another block size, dtype and slice of heads.

    row(pool, i) = block table[(offset + i) // block_tokens], slot (offset + i) % block_tokens

For each token i, layer, keys and values, and each h below num_heads: target row i of head target_head + h = source row
i of head source_head + h.
Between blocks of one dtype that is the very bytes, scale included. Between others it goes through float32: widened, by
one rounding of scale * element, then rounded to bfloat16 or float16 (to nearest, ties to even, to infinity beyond all
numbers) or quantized as by `quantize_rows`.
What the bytes of a block mean stands in kernels/kv_format.py.

source        uint8 [source blocks, source_format.block_bytes], contiguous
source_table  [n] int32, contiguous: the blocks that hold the tokens, in order
target        uint8 [target blocks, target_format.block_bytes], contiguous; shares no memory with source
target_table  [m] int32, contiguous: likewise; it may not name a block twice, which is the caller's to see to

All on one device, or the source on another CUDA device whose memory that one can read; both pools begin at a multiple
of 4 bytes.

A row's bits depend on that row alone. A NaN stays one, whichever; a quantized row that held one, or an infinity, stands
for NaNs. Every other byte of the target stays as it is.

On CUDA it is one launch, and nobody waits for the values of the tables: of a token whose block in either pool is out
of range nothing is read or written. On a CPU that is an IndexError, with nothing written. Entries of a table that hold
none of the tokens are not looked at.

On a CPU it computes on the calling thread alone, without Python's lock and without the threads that other ops share
(kernels/cpu/team.c). Threads may call it at once, and beside one that computes, as long as no two write one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.kv_format import ELEMENTS, KvFormat, quantize_rows, widen_rows


def transfer_tokens(
    source: Tensor,
    source_format: KvFormat,
    source_table: Tensor,
    source_offset: int,
    target: Tensor,
    target_format: KvFormat,
    target_table: Tensor,
    target_offset: int,
    num_tokens: int,
    *,
    source_head: int = 0,
    target_head: int = 0,
    num_heads: int | None = None,
) -> None:
    """Writes the rows of num_tokens tokens into the target; see the module for shapes.

    source_offset, target_offset: the first token's slot, counted from the beginning of the table's first block.
    num_heads heads move, from source_head of the source to target_head of the target on; default: all from there on
    that the target has.
    Raises ValueError for tensors, formats and numbers that break the contract and, on a CPU, IndexError, with nothing
    written, for a block out of range.
    """
    triton = in_triton("transfer_tokens", target)
    num_heads = target_format.num_kv_heads - target_head if num_heads is None else num_heads
    _check_formats(source_format, target_format)
    _check_heads("source", source_format, source_head, num_heads)
    _check_heads("target", target_format, target_head, num_heads)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    _check_side("source", source, source_format, source_table, source_offset, num_tokens, target)
    _check_side("target", target, target_format, target_table, target_offset, num_tokens, target)
    if _overlap(source, target):
        raise ValueError("target must share no memory with source")
    if triton:
        from kernels.cuda.transfer import transfer_tokens as launch

        launch(
            source, source_format, source_table, source_offset, target, target_format, target_table, target_offset,
            num_tokens, source_head, target_head, num_heads,
        )  # fmt: skip
        return
    failed = library.call(
        "tandem_transfer_tokens",
        *_arguments(source, source_format, source_table, source_offset),
        *_arguments(target, target_format, target_table, target_offset),
        num_tokens, source_format.num_layers, source_format.head_dim, source_head, target_head, num_heads,
    )  # fmt: skip
    if failed:
        name, table, pool = ("source", source_table, source) if failed > 0 else ("target", target_table, target)
        index = abs(failed) - 1
        raise IndexError(f"{name}_table[{index}] is {int(table[index])}, and {name} has {pool.shape[0]} blocks")


def transfer_tokens_reference(
    source: Tensor,
    source_format: KvFormat,
    source_table: Tensor,
    source_offset: int,
    target: Tensor,
    target_format: KvFormat,
    target_table: Tensor,
    target_offset: int,
    num_tokens: int,
    *,
    source_head: int = 0,
    target_head: int = 0,
    num_heads: int | None = None,
) -> None:
    """The same in plain torch."""
    tokens = torch.arange(num_tokens, device=source.device)
    num_heads = target_format.num_kv_heads - target_head if num_heads is None else num_heads
    heads = slice(source_head, source_head + num_heads)
    block, slot = _places(source_format, source_table, source_offset + tokens)
    rows, scales = source_format.elements(source), source_format.scales(source)
    rows = rows[block, :, :, heads, slot]  # [tokens, layers, 2, heads, head_dim]
    scales = None if scales is None else scales[block, :, :, heads, slot]
    if source_format.dtype != target_format.dtype:
        if scales is not None:
            rows, scales = widen_rows(rows, scales, source_format.dtype), None
        if target_format.quantized:
            rows, scales = quantize_rows(rows, target_format.dtype)
        rows = rows.to(ELEMENTS[target_format.dtype])
    block, slot = _places(target_format, target_table, target_offset + tokens)
    heads = slice(target_head, target_head + num_heads)
    target_format.elements(target)[block, :, :, heads, slot] = rows
    target_scales = target_format.scales(target)
    if scales is not None and target_scales is not None:
        target_scales[block, :, :, heads, slot] = scales


def _places(form: KvFormat, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and slots."""
    return table.long()[rows // form.block_tokens], rows % form.block_tokens


def _arguments(pool: Tensor, form: KvFormat, table: Tensor, offset: int) -> tuple[int, ...]:
    return (
        pool.data_ptr(), table.data_ptr(), offset, pool.shape[0],
        form.number, form.num_kv_heads, form.block_tokens,
    )  # fmt: skip


def _check_formats(source: KvFormat, target: KvFormat) -> None:
    for name in ("num_layers", "head_dim"):
        if getattr(source, name) != getattr(target, name):
            raise ValueError(f"formats must share {name}, got {getattr(source, name)} and {getattr(target, name)}")
    if source.head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8, got {source.head_dim}")


def _check_heads(name: str, form: KvFormat, first: int, num_heads: int) -> None:
    if first < 0 or not 0 < num_heads <= form.num_kv_heads - first:
        raise ValueError(
            f"{num_heads} heads from {name}_head {first} on must be among the {name}'s {form.num_kv_heads}"
        )


def _check_side(
    name: str, pool: Tensor, form: KvFormat, table: Tensor, offset: int, num_tokens: int, target: Tensor
) -> None:
    if (
        pool.dtype != torch.uint8
        or pool.dim() != 2
        or pool.shape[1] != form.block_bytes
        or not pool.is_contiguous()
        or pool.data_ptr() % 4
    ):
        raise ValueError(
            f"{name} must be contiguous torch.uint8 [blocks, {form.block_bytes}] from a multiple of 4 bytes on, "
            f"got {pool.dtype} {list(pool.shape)} {pool.stride()}"
        )
    if table.dtype != torch.int32 or table.dim() != 1 or not table.is_contiguous():
        raise ValueError(f"{name}_table must be contiguous int32 [n], got {table.dtype} {list(table.shape)}")
    if table.device != target.device:
        raise ValueError(f"{name}_table must be on {target.device} like target, got {table.device}")
    if pool.device != target.device and not (pool.is_cuda and target.is_cuda):  # another device's memory, mapped here
        raise ValueError(f"{name} must be on {target.device} like target, or on a device beside it, got {pool.device}")
    if offset < 0:
        raise ValueError(f"{name}_offset must not be negative, got {offset}")
    room = table.shape[0] * form.block_tokens
    if offset + num_tokens > room:
        raise ValueError(
            f"{name}_table has {room} slots, too few for {name}_offset {offset} and num_tokens {num_tokens}"
        )


def _overlap(source: Tensor, target: Tensor) -> bool:
    begin, end = source.data_ptr(), target.data_ptr()
    return begin < end + target.numel() and end < begin + source.numel()
