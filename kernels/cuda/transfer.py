"""Rows from pool to pool: one launch, a program for each few tokens of a plane of the target.

Rows of one dtype move as words of 4 bytes, 16 bytes for each thread and load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.elements import decode, encode, most_of, scale_of
from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant
from kernels.kv_format import ELEMENTS, KvFormat

_TILE = {"words": 2048, "elements": 4096}  # of a program: their loads wait together
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}  # of others bytes
_NAN = tl.constexpr(0x7FC00000)
_STEPPING = ["source_offset", "target_offset", "num_tokens", "source_blocks", "target_blocks"]
_STEPPING += ["source_head", "target_head"]


@triton.jit
def _widen(elements, FORM: tl.constexpr):
    """Elements as they are kept -> float32."""
    if FORM == "fp8":
        value = decode(elements, FORM, 0).to(tl.int32, bitcast=True)
        return tl.where((elements.to(tl.int32) & 0x7F) == 0x7F, _NAN, value).to(tl.float32, bitcast=True)
    return elements.to(tl.float32)


@triton.jit(do_not_specialize=_STEPPING)
def _transfer(
    source, source_scales, source_table, target, target_scales, target_table,
    source_offset, target_offset, num_tokens, source_blocks, target_blocks, source_head, target_head,
    halves, source_heads, target_heads, num_heads,
    FROM: tl.constexpr, TO: tl.constexpr, QUANTIZED: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE_TOKENS: tl.constexpr, SOURCE_PLANE: tl.constexpr, TARGET_TOKENS: tl.constexpr, TARGET_PLANE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """WIDTH: elements of a row. SOURCE_PLANE: words of a plane, the last SOURCE_TOKENS of them its scales, if any."""
    source_part: tl.constexpr = 32 // source.dtype.element_ty.primitive_bitwidth  # elements of a word
    target_part: tl.constexpr = 32 // target.dtype.element_ty.primitive_bitwidth
    planes = halves * num_heads
    half = tl.program_id(0) % planes // num_heads
    head = tl.program_id(0) % num_heads
    tokens = tl.program_id(0) // planes * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    source_row, target_row = source_offset + tokens, target_offset + tokens
    present = tokens < num_tokens
    source_block = tl.load(source_table + source_row // SOURCE_TOKENS, present, other=-1)
    target_block = tl.load(target_table + target_row // TARGET_TOKENS, present, other=-1)
    present = (
        (source_block >= 0) & (source_block < source_blocks) & (target_block >= 0) & (target_block < target_blocks)
    )
    within = present[:, None] & (columns < WIDTH)[None, :]
    # of the plane, by number; of the row within it
    source_plane = (source_block.to(tl.int64) * halves + half) * source_heads + source_head + head
    target_plane = (target_block.to(tl.int64) * halves + half) * target_heads + target_head + head
    source_slot, target_slot = source_row % SOURCE_TOKENS, target_row % TARGET_TOKENS
    source_start = source_plane * (SOURCE_PLANE * source_part) + source_slot * WIDTH
    target_start = target_plane * (TARGET_PLANE * target_part) + target_slot * WIDTH
    source_scale = source_scales + (source_plane + 1) * SOURCE_PLANE - SOURCE_TOKENS + source_slot
    target_scale = target_scales + (target_plane + 1) * TARGET_PLANE - TARGET_TOKENS + target_slot

    rows = tl.load(source + source_start[:, None] + columns[None, :], within, other=0)
    if FROM == TO:
        tl.store(target + target_start[:, None] + columns[None, :], rows, within)
        if QUANTIZED:
            tl.store(target_scale, tl.load(source_scale, present, other=0), present)
    else:
        rows = _widen(rows, FROM)
        if FROM == "int8" or FROM == "fp8":
            rows *= tl.load(source_scale, present, other=0.0)[:, None]
        if QUANTIZED:
            scale, inverse = scale_of(most_of(rows), TO)
            tl.store(target_scale, scale, present)
            rows = encode(rows * inverse[:, None], TO)
        else:
            rows = narrow(rows, target.dtype.element_ty)
        tl.store(target + target_start[:, None] + columns[None, :], rows, within)


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
    source_head: int,
    target_head: int,
    num_heads: int,
) -> None:
    """On checked tensors. A token with a block out of range in either pool is left out."""
    constants = _constants(source_format, target_format)
    if source_format.dtype == target_format.dtype:
        words = scales = torch.int32
        rows, written = source.view(words), target.view(words)
    else:
        scales = torch.float32
        rows, written = source.view(ELEMENTS[source_format.dtype]), target.view(ELEMENTS[target_format.dtype])
    halves = 2 * target_format.num_layers
    arguments = (
        rows, source.view(scales), source_table, written, target.view(scales), target_table,
        source_offset, target_offset, num_tokens, source.shape[0], target.shape[0], source_head, target_head,
        halves, source_format.num_kv_heads, target_format.num_kv_heads, num_heads,
    )  # fmt: skip
    programs = triton.cdiv(num_tokens, constants["TOKENS"]) * halves * num_heads
    launch(_transfer, (programs,), *arguments, **constants)


def variants(capability: int) -> list[Variant]:
    """Every pair of dtypes, for heads of 64 and of 128 elements and blocks of 16 to blocks of 32 tokens."""
    pairs = [(source, target) for source in ELEMENTS for target in ELEMENTS]
    return [
        Variant(
            name=f"transfer_tokens {source} to {target} x{head_dim}",
            kernel=_transfer,
            arguments={
                "source": _pointer(source, source == target),
                "source_scales": "*i32" if source == target else "*fp32",
                "source_table": "*i32",
                "target": _pointer(target, source == target),
                "target_scales": "*i32" if source == target else "*fp32",
                "target_table": "*i32",
                **dict.fromkeys(_STEPPING, "i32"),
                **dict.fromkeys(("halves", "source_heads", "target_heads", "num_heads"), "i32"),
            },
            constants=_constants(KvFormat(source, 1, 1, head_dim, 16), KvFormat(target, 1, 1, head_dim, 32)),
        )
        for head_dim in (64, 128)
        for source, target in pairs
    ]


def _constants(source: KvFormat, target: KvFormat) -> dict[str, int | float | str]:
    same = source.dtype == target.dtype
    width = source.head_dim * ELEMENTS[source.dtype].itemsize // 4 if same else source.head_dim
    columns = triton.next_power_of_2(width)
    return {
        "FROM": source.dtype,
        "TO": target.dtype,
        "QUANTIZED": target.quantized,
        "WIDTH": width,
        "SOURCE_TOKENS": source.block_tokens,
        "SOURCE_PLANE": source.plane_bytes // 4,
        "TARGET_TOKENS": target.block_tokens,
        "TARGET_PLANE": target.plane_bytes // 4,
        "TOKENS": max(_TILE["words" if same else "elements"] // columns, 1),
        "COLUMNS": columns,
    }


def _pointer(dtype: str, words: bool) -> str:
    return "*i32" if words else _POINTERS.get(dtype, "*i8")
