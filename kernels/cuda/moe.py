"""Mixture of experts: a program for each token of the gating, for each expert of the routing, for each tile of the
linear layers, whose rows are a block of one expert's, and for each token of the sums.

The linear layers of widths that are no multiples of 16 are right, and slow: no model at hand has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import dot, launch, narrow
from kernels.cuda.variant import Variant
from kernels.moe import BLOCK_ROWS, Routing

_PAIRS = 1024  # that a program of the routing looks at together
_WIDTH = 1024  # columns of a program of the sums
_GROUP = 8  # blocks that go through a weight side by side, so that it is read from memory once for all of them
_TYPES = ("bf16", "fp32")

_LOWEST = tl.constexpr(-(2**63))
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def _rising(bits):
    """A float32's bits as an integer that rises with it, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _top_k_gating(
    logits,
    weights,
    experts,
    num_experts,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    within = expert < num_experts
    logit = tl.load(logits + token * num_experts + expert, within, other=float("-inf")).to(tl.float32)
    # one number for a logit and its expert, so that one maximum finds both; 0 and -0 are equal, and NaNs too
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    bits = tl.where(logit == logit, bits, _NAN)
    ranks = (_rising(bits).to(tl.int64) << 32) | (EXPERTS - 1 - expert).to(tl.int64)
    ranks = tl.where(within, ranks, _LOWEST)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int64)
    for choice in tl.static_range(CHOICES):  # pyright: ignore[reportGeneralTypeIssues]
        best = tl.max(ranks)
        chosen = tl.where(slot == choice, best, chosen)
        ranks = tl.where(ranks == best, _LOWEST, ranks)
    best_logit = _rising((chosen >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-best_logit))
    else:
        highest = tl.max(logit)
        score = tl.exp(best_logit - highest)
        if not RENORMALIZE:
            score = score / tl.sum(tl.exp(logit - highest))
    if RENORMALIZE:
        score = score / tl.sum(tl.where(slot < CHOICES, score, 0.0))
    tl.store(weights + token * CHOICES + slot, score, slot < CHOICES)
    chosen_expert = EXPERTS - 1 - (chosen & (EXPERTS - 1)).to(tl.int32)
    tl.store(experts + token * CHOICES + slot, chosen_expert, slot < CHOICES)


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def _count(experts, counts, num_pairs, first_expert, PAIRS: tl.constexpr):
    expert = tl.program_id(0)
    found = tl.zeros([PAIRS], tl.int32)
    for first in range(0, num_pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        found += (tl.load(experts + pair, pair < num_pairs, other=-1) == first_expert + expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found))


@triton.jit(do_not_specialize=["num_pairs", "num_rows", "first_expert"])
def _place(
    experts,
    counts,
    sorted_pairs,
    block_experts,
    offsets,
    num_pairs,
    num_rows,
    num_experts,
    first_expert,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    expert = tl.program_id(0)  # the last program has none, and the rows that no expert has
    other = tl.arange(0, EXPERTS)
    count = tl.load(counts + other, other < num_experts, other=0)
    padded = (count + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    start = tl.sum(tl.where(other < expert, padded, 0))
    end = start + tl.sum(tl.where(other == expert, padded, 0))
    end = tl.where(expert < num_experts, end, num_rows)
    tl.store(offsets + expert, start)
    row = start
    if end > start and expert < num_experts:
        for first in range(0, num_pairs, PAIRS):
            pair = first + tl.arange(0, PAIRS)
            mine = (tl.load(experts + pair, pair < num_pairs, other=-1) == first_expert + expert).to(tl.int32)
            tl.store(sorted_pairs + row + tl.cumsum(mine, 0) - 1, pair, mine != 0)
            row += tl.sum(mine)
    for first in range(row, end, PAIRS):  # pyright: ignore[reportArgumentType]
        empty = first + tl.arange(0, PAIRS)
        tl.store(sorted_pairs + empty, -1, empty < end)
    for first in range(start // BLOCK_ROWS, end // BLOCK_ROWS, PAIRS):
        block = first + tl.arange(0, PAIRS)
        tl.store(block_experts + block, tl.where(expert < num_experts, expert, -1), block < end // BLOCK_ROWS)


@triton.jit
def _grouped_linear(
    x,
    weight,
    bias,
    sorted_pairs,
    block_experts,
    pair_weights,
    out,
    in_features,
    out_features,
    CHOICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    block, tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    expert = tl.load(block_experts + block)
    if expert < 0:
        return
    pair = tl.load(sorted_pairs + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    used = pair >= 0
    output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    within = output < out_features
    feature = tl.arange(0, BLOCK_IN)
    x_tile = x + (pair // CHOICES).to(tl.int64)[:, None] * in_features + feature[None, :]
    weight_row = expert.to(tl.int64) * out_features + output
    weight_tile = weight + weight_row[None, :] * in_features + feature[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for first in range(0, in_features, BLOCK_IN):
        left = feature < in_features - first
        a = tl.load(x_tile + first, used[:, None] & left[None, :], other=0.0)
        b = tl.load(weight_tile + first, left[:, None] & within[None, :], other=0.0)
        sums = dot(a, b, sums)
    if BIASED:
        sums += tl.load(bias + weight_row, within, other=0.0).to(tl.float32)[None, :]
    if WEIGHTED:
        sums *= tl.load(pair_weights + pair, used, other=0.0)[:, None]
    out_tile = out + pair.to(tl.int64)[:, None] * out_features + output[None, :]
    tl.store(out_tile, narrow(sums, out.dtype.element_ty), used[:, None] & within[None, :])


@triton.jit
def _combine(
    y,
    shared,
    shared_gate,
    out,
    width,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    GATES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    within = column < width
    first = y + token * CHOICES * width + column
    total = tl.load(first, within, other=0.0).to(tl.float32)
    for choice in tl.static_range(1, CHOICES):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(first + choice * width, within, other=0.0).to(tl.float32)
    if SHARED:
        added = tl.load(shared + token * width + column, within, other=0.0).to(tl.float32)
        if GATES == 1:
            added *= 1.0 / (1.0 + tl.exp(-tl.load(shared_gate + token).to(tl.float32)))
        if GATES == 2:
            first_logit = tl.load(shared_gate + token * 2).to(tl.float32)
            second_logit = tl.load(shared_gate + token * 2 + 1).to(tl.float32)
            higher = tl.maximum(first_logit, second_logit)
            first_score = tl.exp(first_logit - higher)
            second_score = tl.exp(second_logit - higher)
            total *= first_score / (first_score + second_score)
            added *= second_score / (first_score + second_score)
        total += added
    tl.store(out + token * width + column, narrow(total, out.dtype.element_ty), within)


def top_k_gating(logits: Tensor, weights: Tensor, experts: Tensor, sigmoid: bool, renormalize: bool) -> None:
    """weights and experts are written."""
    tokens, num_experts = logits.shape
    constants = _gating_constants(num_experts, weights.shape[1], sigmoid, renormalize)
    launch(_top_k_gating, (tokens,), logits, weights, experts, num_experts, **constants, num_warps=1)


def route(routing: Routing, first: int) -> None:
    """All but routing.experts is written. first: the number of the first expert."""
    num_pairs, num_experts, counts = routing.num_pairs, routing.num_experts, routing.counts
    launch(_count, (num_experts,), routing.experts, counts, num_pairs, first, PAIRS=_PAIRS)
    rows, blocks = routing.sorted_pairs, routing.block_experts
    arguments = (routing.experts, counts, rows, blocks, routing.offsets, num_pairs, len(rows), num_experts, first)
    launch(_place, (num_experts + 1,), *arguments, **_place_constants(num_experts, routing.block_rows))


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, pair_weights: Tensor | None, out: Tensor
) -> None:
    """x: a row for each token or each pair."""
    _, out_features, in_features = weight.shape
    kind = "fp32" if x.dtype == torch.float32 else "bf16"
    constants, num_stages = _linear_constants(kind, out_features, routing.block_rows)
    constants |= {
        "CHOICES": len(out) // max(len(x), 1),
        "BIASED": bias is not None,
        "WEIGHTED": pair_weights is not None,
    }
    grid = (triton.cdiv(out_features, constants["BLOCK_OUT"]), len(routing.block_experts))
    routed = (routing.sorted_pairs, routing.block_experts, pair_weights)
    arguments = (x, weight, bias, *routed, out, in_features, out_features)
    launch(_grouped_linear, grid, *arguments, **constants, num_stages=num_stages)


def combine(y: Tensor, k: int, shared: Tensor | None, shared_gate: Tensor | None, out: Tensor) -> None:
    """k rows of y for each of out."""
    tokens, width = out.shape
    constants = _sums_constants(k, shared is not None, 0 if shared_gate is None else shared_gate.shape[1])
    launch(_combine, (tokens, triton.cdiv(width, _WIDTH)), y, shared, shared_gate, out, width, **constants)


def variants(capability: int) -> list[Variant]:
    """Mixtral-8x7B, Qwen1.5-MoE, the largest of DeepSpeed-MoE's (residual, 128 experts), and the most experts."""
    found = [_routing_count()]
    for experts, choices, sigmoid, renormalize in (
        (8, 2, False, True), (60, 4, False, False), (128, 1, False, False), (256, 8, True, True),
    ):  # fmt: skip
        found += [
            _routing_place(experts),
            *(_gating(dtype, experts, choices, sigmoid, renormalize) for dtype in _TYPES),
        ]
    for name, hidden, intermediate, width, choices, gates in (
        ("mixtral", 4096, 14336, 28672, 2, 0), ("qwen", 2048, 1408, 2816, 4, 1), ("deepspeed", 2048, 8192, 8192, 1, 2),
    ):  # fmt: skip
        biased = name == "deepspeed"
        for dtype in _TYPES:
            found += [
                _linear(f"{name} first", dtype, hidden, width, choices, biased, False),
                _linear(f"{name} second", dtype, intermediate, hidden, 1, biased, True),
                _sums(dtype, choices, gates),
            ]
    return found


def _gating(dtype: str, experts: int, choices: int, sigmoid: bool, renormalize: bool) -> Variant:
    return Variant(
        name=f"moe gating {dtype} {choices} of {experts}",
        kernel=_top_k_gating,
        arguments={"logits": f"*{dtype}", "weights": "*fp32", "experts": "*i32", "num_experts": "i32"},
        constants=_gating_constants(experts, choices, sigmoid, renormalize),
        num_warps=1,
    )


def _routing_count() -> Variant:
    return Variant(
        name="moe count",
        kernel=_count,
        arguments={"experts": "*i32", "counts": "*i32", "num_pairs": "i32", "first_expert": "i32"},
        constants={"PAIRS": _PAIRS},
    )


def _routing_place(experts: int) -> Variant:
    pointers = ("experts", "counts", "sorted_pairs", "block_experts", "offsets")
    arguments: dict[str, str] = dict.fromkeys(pointers, "*i32")
    return Variant(
        name=f"moe place {experts}",
        kernel=_place,
        arguments=arguments | dict.fromkeys(("num_pairs", "num_rows", "num_experts", "first_expert"), "i32"),
        constants=_place_constants(experts, BLOCK_ROWS),
    )


def _linear(
    name: str, dtype: str, in_features: int, out_features: int, choices: int, biased: bool, weighted: bool
) -> Variant:
    constants, num_stages = _linear_constants(dtype, out_features, BLOCK_ROWS)
    return Variant(
        name=f"moe linear {name} {dtype}",
        kernel=_grouped_linear,
        arguments={
            "x": f"*{dtype}",
            "weight": f"*{dtype}",
            "bias": f"*{dtype}",
            "sorted_pairs": "*i32",
            "block_experts": "*i32",
            "pair_weights": "*fp32",
            "out": f"*{dtype}",
            "in_features": "i32",
            "out_features": "i32",
        },
        constants=constants | {"CHOICES": choices, "BIASED": biased, "WEIGHTED": weighted},
        aligned=tuple(
            name for name, size in (("in_features", in_features), ("out_features", out_features)) if size % 16 == 0
        ),
        num_stages=num_stages,
        matrix=dtype != "fp32",
    )


def _sums(dtype: str, choices: int, gates: int) -> Variant:
    return Variant(
        name=f"moe combine {dtype} {choices}{('', ' shared', ' residual')[gates]}",
        kernel=_combine,
        arguments={**dict.fromkeys(("y", "shared", "shared_gate", "out"), f"*{dtype}"), "width": "i32"},
        constants=_sums_constants(choices, gates > 0, gates),
        aligned=("width",),
    )


def _gating_constants(num_experts: int, choices: int, sigmoid: bool, renormalize: bool) -> dict[str, int | bool]:
    return {
        "CHOICES": choices,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "SLOTS": triton.next_power_of_2(choices),
        "SIGMOID": sigmoid,
        "RENORMALIZE": renormalize,
    }


def _place_constants(num_experts: int, block_rows: int) -> dict[str, int]:
    return {"EXPERTS": triton.next_power_of_2(num_experts), "BLOCK_ROWS": block_rows, "PAIRS": _PAIRS}


def _sums_constants(choices: int, shared: bool, gates: int) -> dict[str, int | bool]:
    return {"CHOICES": choices, "WIDTH": _WIDTH, "SHARED": shared, "GATES": gates}


def _linear_constants(dtype: str, out_features: int, block_rows: int) -> tuple[dict[str, int], int]:
    """(constants, num_stages), of the weight alone: another number of rows must not be another kernel.

    Narrow tiles where wide ones would be fewer than the processors of a GPU while a batch is small.
    """
    if dtype == "fp32":
        tile, num_stages = {"BLOCK_OUT": 64, "BLOCK_IN": 16}, 3
    elif out_features > 4096:
        tile, num_stages = {"BLOCK_OUT": 128, "BLOCK_IN": 64}, 3
    else:
        tile, num_stages = {"BLOCK_OUT": 64, "BLOCK_IN": 64}, 4
    return {**tile, "BLOCK_ROWS": block_rows, "GROUP": _GROUP}, num_stages
