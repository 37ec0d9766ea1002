"""Penalties: a program for a part of a row, done at once where the row has none; counts, a thread for each row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch
from kernels.cuda.variant import Variant
from kernels.penalties import IN_PROMPT

_TILE, _NUM_WARPS = 4096, 8
_ROWS = 128
_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit(do_not_specialize=["num_slots"])
def _edit_tokens(logits, stride, slots, counts, num_slots, settings, vocab, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    repetition = tl.load(settings + row * 3)
    frequency = tl.load(settings + row * 3 + 1)
    presence = tl.load(settings + row * 3 + 2)
    changes = (repetition != 1) | (frequency != 0) | (presence != 0)
    if changes & (slot >= 0) & (slot < num_slots):
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        word = tl.load(counts + slot * vocab + column, column < vocab, other=0)
        place = logits + row * stride + column
        x = tl.load(place, word != 0, other=0.0)
        count = word & (_IN_PROMPT - 1)
        x = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = x - frequency * count.to(tl.float32)
        x = x - presence * (count > 0).to(tl.float32)
        tl.store(place, x, word != 0)


@triton.jit(do_not_specialize=["rows", "num_slots"])
def _count_tokens(counts, num_slots, slots, tokens, rows, vocab, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, row < rows, other=-1).to(tl.int64)
    token = tl.load(tokens + row, row < rows, other=-1)
    known = (slot >= 0) & (slot < num_slots) & (token >= 0) & (token < vocab)
    place = counts + slot * vocab + token
    tl.store(place, tl.load(place, known, other=0) + 1, known)


def edit_tokens(logits: Tensor, slots: Tensor, counts: Tensor, settings: Tensor) -> None:
    rows, vocab = logits.shape
    grid = (rows, triton.cdiv(vocab, _TILE))
    arguments = (logits, logits.stride(0), slots, counts, len(counts), settings, vocab)
    launch(_edit_tokens, grid, *arguments, TILE=_TILE, num_warps=_NUM_WARPS)


def count_tokens(counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
    num_slots, vocab = counts.shape
    grid = (triton.cdiv(len(tokens), _ROWS),)
    launch(_count_tokens, grid, counts, num_slots, slots, tokens, len(tokens), vocab, ROWS=_ROWS)


def variants(capability: int) -> list[Variant]:
    return [
        Variant(
            name="penalties edit_tokens",
            kernel=_edit_tokens,
            arguments={
                "logits": "*fp32",
                "stride": "i32",
                "slots": "*i64",
                "counts": "*i32",
                "num_slots": "i32",
                "settings": "*fp32",
                "vocab": "i32",
            },
            constants={"TILE": _TILE},
            aligned=("stride", "vocab"),
            num_warps=_NUM_WARPS,
        ),
        Variant(
            name="penalties count_tokens",
            kernel=_count_tokens,
            arguments={
                "counts": "*i32",
                "num_slots": "i32",
                "slots": "*i64",
                "tokens": "*i64",
                "rows": "i32",
                "vocab": "i32",
            },
            constants={"ROWS": _ROWS},
            aligned=("vocab",),
        ),
    ]
