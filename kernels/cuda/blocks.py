"""Blocks by number: one launch for all of them, a program for each part of a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch
from kernels.cuda.variant import Variant

_PART = 2048  # words of a program: four loads of 16 bytes for each thread, which wait together


@triton.jit(do_not_specialize=["num_sources", "num_targets"])
def _copy_blocks(
    source, source_ids, target, target_ids, num_sources, num_targets, source_stride, target_stride, width, parts,
    GATHERS: tl.constexpr, SCATTERS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = program // parts
    words = (program % parts) * PART + tl.arange(0, PART)
    readable, writable = width, width
    block, place = index.to(tl.int64), index.to(tl.int64)
    if GATHERS:
        block = tl.load(source_ids + index).to(tl.int64)
        readable = tl.where((block >= 0) & (block < num_sources), width, 0)
    if SCATTERS:  # of a source that is not there, nothing
        place = tl.load(target_ids + index).to(tl.int64)
        writable = tl.where((place >= 0) & (place < num_targets), readable, 0)
    value = tl.load(source + block * source_stride + words, words < readable, other=0)
    tl.store(target + place * target_stride + words, value, words < writable)


def copy_blocks(source: Tensor, source_ids: Tensor | None, target: Tensor, target_ids: Tensor | None) -> None:
    """uint8 [blocks, block_bytes], the bytes of each contiguous; None for ids: 0, 1, 2 and so on."""
    steps = (source.shape[1], source.stride(0), target.stride(0), source.data_ptr(), target.data_ptr())
    if all(step % 4 == 0 for step in steps):
        source, target = source.view(torch.int32), target.view(torch.int32)
    width = source.shape[1]
    parts = triton.cdiv(width, _PART)
    count = (source if source_ids is None else source_ids).shape[0]
    arguments = (
        source, source_ids, target, target_ids, source.shape[0], target.shape[0],
        source.stride(0), target.stride(0), width, parts,
    )  # fmt: skip
    constants = {"GATHERS": source_ids is not None, "SCATTERS": target_ids is not None, "PART": _PART}
    launch(_copy_blocks, (count * parts,), *arguments, **constants)


def variants(capability: int) -> list[Variant]:
    """Blocks of a whole number of 64 bytes, as those of every model are; and bytes that are no such number."""
    return [
        Variant(
            name=f"{name} {words} {ids}",
            kernel=_copy_blocks,
            arguments={
                "source": f"*{words}",
                "source_ids": f"*{ids}",
                "target": f"*{words}",
                "target_ids": f"*{ids}",
                **dict.fromkeys(("num_sources", "num_targets"), "i32"),
                **dict.fromkeys(("source_stride", "target_stride", "width", "parts"), "i32"),
            },
            constants={"GATHERS": gathers, "SCATTERS": scatters, "PART": _PART},
            aligned=("source_stride", "target_stride", "width") if words == "i32" else (),
        )
        for words in ("i32", "u8")
        for ids in ("i32", "i64")
        for name, gathers, scatters in (
            ("gather_blocks", True, False),
            ("scatter_blocks", False, True),
            ("copy_blocks", True, True),
        )
    ]
