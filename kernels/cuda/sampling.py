"""The next token of each row: a program for each row, which reads it from the L2 cache as often as its filters need.

    the highest logit            once, and all there is to do at temperature 0
    top-k, top-p                 a dozen times or so each: the cut is searched between the highest logit and the lowest
    the weights' sum             once for top-p, of what top-k leaves
    each tile's sum, the draw    once; then the tile that holds the point again

Nothing is kept between the passes: e is computed again from the logit, by the CPU op's own operations (vf_exp in
kernels/cpu/simd.h), each rounded alike. As that exp never falls where its argument rises (true of every float32 that it
can get), a cut through e is a cut through the logits. Weights are added as integers, so tiles may be of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch
from kernels.cuda.variant import Variant

_TILE = 4096
_UNIFORMS_BLOCK = 128
_COUNTS, _WEIGHS = tl.constexpr(False), tl.constexpr(True)
_INFINITY = tl.constexpr(float("inf"))
_LOWEST_KEY = tl.constexpr(-0x7F800001)  # of minus infinity


@triton.jit
def _draw(
    logits, stride, settings, uniforms, seeds, indices, positions, tokens, kept, vocab, scale,
    MAKES_UNIFORMS: tl.constexpr, KEEPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    temperature = tl.load(settings + row * 4)
    high, token = _highest(logits, vocab, TILE)
    if tl.abs(high) < _INFINITY:  # a NaN is not
        if temperature != 0:
            divisor = temperature.to(tl.float32)
            best = tl.div_rn(high, divisor)
            if tl.abs(best) < _INFINITY:
                if MAKES_UNIFORMS:
                    uniform = _uniform(tl.load(seeds + row), tl.load(indices + row), tl.load(positions + row))
                else:
                    uniform = tl.load(uniforms + row)
                top_k = tl.load(settings + row * 4 + 1)
                top_p = tl.load(settings + row * 4 + 2)
                min_p = tl.load(settings + row * 4 + 3).to(tl.float32)
                least = tl.cast(-_INFINITY, tl.float32)  # the lowest score that stays
                if (top_k > 0) & (top_k < vocab):
                    kth = _cut(logits, vocab, top_k.to(tl.int64), high, best, least, divisor, scale, _COUNTS, TILE)
                    least = tl.div_rn(kth, divisor)
                limit = tl.cast(-1.0, tl.float32)  # the lowest e that stays; of those that equal it only the first ones
                needed = tl.cast(0, tl.int64)
                if top_p < 1:
                    total = _total(logits, vocab, best, least, divisor, scale, TILE)
                    needed = tl.maximum(total - ((1.0 - top_p) * total.to(tl.float64)).to(tl.int64), 1)
                    last = _cut(logits, vocab, needed, high, best, least, divisor, scale, _WEIGHS, TILE)
                    limit = _exp(tl.div_rn(last, divisor) - best)
                token = _pick(
                    logits, vocab, best, least, limit, needed, min_p, divisor, scale, uniform,
                    kept + row * vocab if KEEPS else None, KEEPS, TILE, TILES,
                )  # fmt: skip
            else:
                token = tl.cast(-1, tl.int64)
    else:
        token = tl.cast(-1, tl.int64)
    tl.store(tokens + row, token)


@triton.jit(do_not_specialize=["count"])
def _fill_uniforms(seeds, indices, positions, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = i < count
    seed = tl.load(seeds + i, within, other=0)
    index = tl.load(indices + i, within, other=0)
    position = tl.load(positions + i, within, other=0)
    tl.store(out + i, _uniform(seed, index, position), within)


@triton.jit
def _uniform(seed, index, position):
    """Philox4x32-10's first 53 bits, in [0, 1)."""
    index = index.to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, position.to(tl.uint32), index, index * 0, index * 0)
    bits = (word0 >> 5).to(tl.int64) * 67108864 + (word1 >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _highest(logits, vocab, TILE: tl.constexpr):
    """The highest logit, NaN if one is, and the first that has it."""
    lane = tl.arange(0, TILE)
    high = tl.full([TILE], -_INFINITY, tl.float32)
    first = tl.zeros([TILE], tl.int32)
    is_nan = tl.zeros([TILE], tl.int1)
    for start in range(0, vocab, TILE):
        x = tl.load(logits + start + lane, start + lane < vocab, other=-_INFINITY)
        first = tl.where(x > high, start + lane, first)
        high = tl.where(x > high, x, high)
        is_nan |= x != x
    highest = tl.max(high, 0)
    token = tl.cast(tl.min(tl.where(high == highest, first, 0x7FFFFFFF), 0), tl.int64)
    return tl.where(tl.cast(tl.max(is_nan.to(tl.int32), 0), tl.int1), float("nan"), highest), token


@triton.jit
def _cut(logits, vocab, needed, high, best, least, divisor, scale, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    """The logit down to which the highest add up to `needed`. Each counts its weight, or 1.

    Between two keys, each of them a logit's: a pass asks how much is above a third, and moves one of the two to the
    logit next to it. The third goes down from the highest in steps that grow, until there is enough above; then it
    halves what is between.
    """
    lane = tl.arange(0, TILE)
    low_key = tl.cast(_LOWEST_KEY, tl.int64)
    high_key = _key_of(high)
    above = tl.cast(0, tl.int64)  # what is higher than high_key adds up to
    step = divisor
    while low_key < high_key:
        key = tl.where(step > 0, _key_of(high - step), (low_key + high_key + 1) >> 1)
        pivot = _of_key(tl.minimum(tl.maximum(key, low_key + 1), high_key))
        upper = _of_key(high_key)
        sums = tl.zeros([TILE], tl.int64 if WEIGHTED else tl.int32)
        next_up = tl.full([TILE], _INFINITY, tl.float32)
        next_down = tl.full([TILE], -_INFINITY, tl.float32)
        for start in range(0, vocab, TILE):
            x = tl.load(logits + start + lane, start + lane < vocab, other=-_INFINITY)
            inside = (x >= pivot) & (x <= upper)
            next_up = tl.where(inside & (x < next_up), x, next_up)
            next_down = tl.where((x < pivot) & (x > next_down), x, next_down)
            if WEIGHTED:
                if tl.cast(
                    tl.max(inside.to(tl.int32), 0), tl.int1
                ):  # soon few tiles have any, and the others need no exp
                    e = _e_of(x, best, least, divisor)
                    sums += tl.where(inside, _weight(e, scale), 0)
            else:
                sums += inside.to(tl.int32)
        found = above + tl.sum(sums, 0).to(tl.int64)
        if found >= needed:
            low_key = _key_of(tl.min(next_up, 0))
            step = step * 0
        else:
            above = found
            high_key = _key_of(tl.max(next_down, 0))
            step *= 4
    return _of_key(high_key)


@triton.jit
def _total(logits, vocab, best, least, divisor, scale, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        x = tl.load(logits + start + lane, start + lane < vocab, other=-_INFINITY)
        sums += _weight(_e_of(x, best, least, divisor), scale)
    return tl.sum(sums, 0)


@triton.jit
def _pick(
    logits, vocab, best, least, limit, needed, min_p, divisor, scale, uniform, kept,
    KEEPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token that owns the point `uniform` of the weights that stay."""
    tiles = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.int64)
    ties = tl.zeros([TILES], tl.int64)
    for tile in range(tl.cdiv(vocab, TILE)):
        e = _e_above(logits, vocab, tile, best, least, min_p, divisor, TILE)
        sum_of_tile = tl.sum(_weight(tl.where(e > limit, e, 0.0), scale), 0)
        sums = tl.where(tiles == tile, sum_of_tile, sums)
        ties = tl.where(tiles == tile, tl.sum((e == limit).to(tl.int32), 0).to(tl.int64), ties)
    # min-p above the limit leaves no ties
    unit = tl.maximum(_weight(limit, scale), 1)
    wanted = tl.where(limit > 0, (needed - tl.sum(sums, 0) + unit - 1) // unit, 0)
    sums += unit * tl.minimum(tl.maximum(wanted - (tl.cumsum(ties, 0) - ties), 0), ties)

    if KEEPS:
        seen = tl.cast(0, tl.int64)
        for tile in range(tl.cdiv(vocab, TILE)):
            e = _e_above(logits, vocab, tile, best, least, min_p, divisor, TILE)
            tied = (e == limit).to(tl.int64)
            stays = (e > limit) | ((e == limit) & (seen + tl.cumsum(tied, 0) <= wanted))
            column = tile * TILE + tl.arange(0, TILE)
            tl.store(kept + column, tl.where(stays, e, 0.0), column < vocab)
            seen += tl.sum(tied, 0)

    total = tl.cast(tl.sum(sums, 0), tl.int64)
    left = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    tile = tl.sum((tl.cumsum(sums, 0) <= left).to(tl.int32), 0)
    left -= tl.sum(tl.where(tiles < tile, sums, 0), 0)
    wanted -= tl.sum(tl.where(tiles < tile, ties, 0), 0)
    e = _e_above(logits, vocab, tile, best, least, min_p, divisor, TILE)
    stays = (e > limit) | ((e == limit) & (tl.cumsum((e == limit).to(tl.int64), 0) <= wanted))
    ends = tl.cumsum(_weight(tl.where(stays, e, 0.0), scale), 0)
    # a token of the vocabulary, whatever the settings and the uniform number are
    return tl.minimum(tile * TILE + tl.sum((ends <= left).to(tl.int32), 0), vocab - 1).to(tl.int64)


@triton.jit
def _e_above(logits, vocab, tile, best, least, min_p, divisor, TILE: tl.constexpr):
    """A tile's e, 0 where it is below min_p."""
    column = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + column, column < vocab, other=-_INFINITY)
    e = _e_of(x, best, least, divisor)
    return tl.where(e < min_p, 0.0, e)


@triton.jit
def _e_of(x, best, least, divisor):
    """exp(score - the highest), 0 where the score is below the least that stays."""
    score = tl.div_rn(x, divisor)
    return tl.where(score < least, 0.0, _exp(score - best))


@triton.jit
def _exp(x):
    """vf_exp of kernels/cpu/simd.h, for x up to 0."""
    below = x < -87.0
    x = tl.maximum(x, -87.0)
    shifted = tl.fma(x, 1.44269504088896341, 12582912.0)  # 1.5 * 2^23: rounds to an integer in the low bits
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    y = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    y = tl.fma(y, r, 8.3334519073e-3)
    y = tl.fma(y, r, 4.1665795894e-2)
    y = tl.fma(y, r, 1.6666665459e-1)
    y = tl.fma(y, r, 5.0000001201e-1)
    y = tl.fma(y, r * r, r) + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(below, 0.0, y * power)


@triton.jit
def _weight(e, scale):
    return (e * scale).to(tl.int64)  # the scale is a power of two: exact


@triton.jit
def _key_of(x):
    """A float32 as an integer of the same order; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _of_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def draw(
    logits: Tensor,
    settings: Tensor,
    uniforms: Tensor | None,
    seeds: Tensor | None,
    indices: Tensor | None,
    positions: Tensor | None,
    tokens: Tensor,
    kept: Tensor | None,
    scale: float,
) -> None:
    """With the uniform numbers, or with what makes them."""
    rows, vocab = logits.shape
    constants = {"MAKES_UNIFORMS": uniforms is None, "KEEPS": kept is not None, **_tiles(vocab)}
    tensors = (settings, uniforms, seeds, indices, positions, tokens, kept)
    arguments = (logits, logits.stride(0), *tensors, vocab, scale)
    launch(_draw, (rows,), *arguments, **constants, num_warps=_num_warps(constants["TILE"]))


def fill_uniforms(seeds: Tensor, indices: Tensor, positions: Tensor, out: Tensor) -> None:
    count = len(out)
    grid = (triton.cdiv(count, _UNIFORMS_BLOCK),)
    launch(_fill_uniforms, grid, seeds, indices, positions, out, count, BLOCK=_UNIFORMS_BLOCK)


def variants(capability: int) -> list[Variant]:
    """SmolLM2's vocabulary and Llama-3.1's: in a CUDA graph, outside, and with what the filters keep."""
    integers = {"seeds": "*i64", "indices": "*i64", "positions": "*i64"}
    return [
        Variant(
            name=f"sampling {name} {vocab}",
            kernel=_draw,
            arguments={
                "logits": "*fp32",
                "stride": "i32",
                "settings": "*fp64",
                "uniforms": "*fp64",
                **integers,
                "tokens": "*i64",
                "kept": "*fp32",
                "vocab": "i32",
                "scale": "fp32",
            },
            constants={"MAKES_UNIFORMS": makes_uniforms, "KEEPS": keeps, **_tiles(vocab)},
            aligned=("stride", "vocab"),
            num_warps=_num_warps(_tiles(vocab)["TILE"]),
        )
        for vocab in (49_152, 128_256)
        for name, makes_uniforms, keeps in (("graph", True, False), ("draw", False, False), ("kept", False, True))
    ] + [
        Variant(
            name="sampling uniforms",
            kernel=_fill_uniforms,
            arguments={**integers, "out": "*fp64", "count": "i32"},
            constants={"BLOCK": _UNIFORMS_BLOCK},
        )
    ]


def _tiles(vocab: int) -> dict[str, int]:
    """TILE: tokens looked at at once. TILES: how many of them a row has, as a power of two."""
    tile = min(triton.next_power_of_2(vocab), _TILE)
    return {"TILE": tile, "TILES": triton.next_power_of_2(triton.cdiv(vocab, tile))}


def _num_warps(tile: int) -> int:
    """8 tokens for each thread."""
    return max(tile // 256, 1)
