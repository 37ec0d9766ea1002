"""The tokens that a step begins with, in one small launch at its head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch
from kernels.cuda.variant import Variant

_ROWS = 128


@triton.jit(do_not_specialize=["num_rows", "num_drawn"])
def _feed(token_ids, sources, drawn, out, num_rows, num_drawn, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = rows < num_rows
    source = tl.load(sources + rows, within, other=-1)
    fed = tl.load(drawn + source, (source >= 0) & (source < num_drawn), other=0)
    known = tl.load(token_ids + rows, within, other=0)
    tl.store(out + rows, tl.where(source >= 0, tl.maximum(fed, 0), known), within)


def feed(token_ids: Tensor, sources: Tensor, drawn: Tensor, out: Tensor) -> None:
    grid = (triton.cdiv(len(out), _ROWS),)
    launch(_feed, grid, token_ids, sources, drawn, out, len(out), len(drawn), ROWS=_ROWS)


def variants(capability: int) -> list[Variant]:
    pointers = {"token_ids": "*i64", "sources": "*i32", "drawn": "*i64", "out": "*i64"}
    numbers = {"num_rows": "i32", "num_drawn": "i32"}
    return [Variant(name="feed", kernel=_feed, arguments={**pointers, **numbers}, constants={"ROWS": _ROWS})]
