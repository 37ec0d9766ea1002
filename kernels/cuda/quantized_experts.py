"""The linear layers of experts whose weights are quantized: a program for each tile of outputs and rows of an expert.

As in kernels/cuda/linear.py the weight is the left operand of a product, and becomes floats in the registers that the
matrix units read. Input features are summed 64 at a time, in order, so that a pair's bits are its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.linear import FEATURES, features_of_a_scale, finish, quantize_rows, weight_tile
from kernels.cuda.rows import PARTS, part_features
from kernels.cuda.tile import dot, launch, narrow
from kernels.cuda.variant import Variant
from kernels.experts import ExpertWeights
from kernels.moe import BLOCK_ROWS, Routing

_BLOCKS = 8  # that go through a weight side by side, so that it is read from memory once for all of them
_FEATURES = tl.constexpr(FEATURES)
_NO_ROW = tl.constexpr(1 << 30)


@triton.jit
def _grouped_quantized(
    x, weight, scale, offset, x_scale, bias, sorted_pairs, block_experts, pair_weights, out,
    in_features, part, num_groups, row_bytes,
    FORM: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_OFFSET: tl.constexpr,
    X_SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, CHOICES: tl.constexpr, OUT: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """TILES: of rows in a block."""
    rows, tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), BLOCKS)
    expert = tl.load(block_experts + rows // TILES).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(sorted_pairs + rows * ROWS + tl.arange(0, ROWS))
    used = pair >= 0
    row = tl.where(used, pair // CHOICES, _NO_ROW)
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    of_expert = weight + expert * OUT * row_bytes
    scales = scale + expert * OUT * num_groups
    offsets = offset + expert * OUT * num_groups if HAS_OFFSET else offset
    x_rows = x + row.to(tl.int64)[None, :] * in_features
    total = tl.zeros([OUTPUTS, ROWS], tl.int32 if X_SCALED else tl.float32)
    for start in range(0, part, _FEATURES):
        for p in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            features = p * part + start + tl.arange(0, _FEATURES)
            within = (start + tl.arange(0, _FEATURES) < part) & (features < in_features)
            values = tl.load(x_rows + features[:, None], used[None, :] & within[:, None], other=0)
            if X_SCALED:
                at = of_expert + outputs[:, None].to(tl.int64) * in_features + features[None, :]
                total = dot(tl.load(at, (outputs < OUT)[:, None] & within[None, :], other=0), values, total)
            else:
                w = weight_tile(
                    of_expert, scales, offsets, outputs, start, in_features, part, num_groups,
                    FORM, p, GROUP, RUN, HAS_OFFSET, OUT, OUTPUTS, x.dtype.element_ty,
                )  # fmt: skip
                total = dot(w, values, total)
    biases = bias + expert * OUT if HAS_BIAS else bias
    y = finish(total, scales, x_scale, biases, outputs, row, _NO_ROW, GROUP == 0, X_SCALED, HAS_BIAS, OUT)
    if WEIGHTED:
        y *= tl.load(pair_weights + pair, used, other=0.0)[None, :]
    to = out + pair.to(tl.int64)[None, :] * OUT + outputs[:, None]
    tl.store(to, narrow(y, out.dtype.element_ty), used[None, :] & (outputs < OUT)[:, None])


def grouped_linear(
    x: Tensor, weight: ExpertWeights, routing: Routing, pair_weights: Tensor | None, out: Tensor
) -> None:
    """x: a row for each token or each pair."""
    choices, x_scale, one = len(out) // max(len(x), 1), None, weight.first
    assert one.quantization is not None
    if one.quantization.dynamic:
        wide, x = x, torch.empty_like(x, dtype=torch.int8)
        x_scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        quantize_rows(wide, x, x_scale)
    group = one.quantization.group or (None if one.offset is None else one.in_features)
    constants, num_stages = _constants(
        one.form, group, one.in_features, one.out_features, routing.block_rows, is_float32=x.dtype == torch.float32
    )
    constants |= {"HAS_OFFSET": one.offset is not None, "X_SCALED": x_scale is not None, "CHOICES": choices}
    constants |= {"HAS_BIAS": one.bias is not None, "WEIGHTED": pair_weights is not None}
    grid = (triton.cdiv(one.out_features, constants["OUTPUTS"]), len(routing.block_experts) * constants["TILES"])
    parts = (one.packed, one.scale, one.offset, x_scale, one.bias)  # the first expert's, where the memory of all begins
    routed = (routing.sorted_pairs, routing.block_experts, pair_weights)
    groups = 1 if group is None else one.in_features // group
    sizes = (one.in_features, part_features(one.form, one.in_features), groups, one.packed.shape[1])
    launch(_grouped_quantized, grid, x, *parts, *routed, out, *sizes, **constants, num_stages=num_stages)


def _constants(
    form: str, group: int | None, in_features: int, out_features: int, block_rows: int, *, is_float32: bool
) -> tuple[dict[str, Any], int]:
    """(constants, num_stages), of the weight alone: another number of rows must not be another kernel."""
    rows = min(block_rows, 32 if form == "fp6" else 64)  # of fp6 four parts at once
    return {
        "FORM": form,
        "PARTS": PARTS[form],
        "GROUP": group or 0,
        "RUN": features_of_a_scale(group, part_features(form, in_features)),
        "OUT": out_features,
        "OUTPUTS": 16 if is_float32 else 64,
        "ROWS": rows,
        "TILES": block_rows // rows,
        "BLOCKS": _BLOCKS,
    }, 1 if is_float32 else 2 if form == "fp6" else 3


def variants(capability: int) -> list[Variant]:
    """Mixtral-8x7B's and Qwen1.5-MoE's in each form."""
    kinds = [
        ("int8", None, False),
        ("int8", None, True),
        ("int4", 32, False),
        ("fp8", None, False),
        ("fp6", None, False),
    ]
    return [
        _variant(f"{name} {which}", dtype, outputs, inputs, choices, form, group, x_scaled)
        for name, hidden, intermediate, k in (("mixtral", 4096, 14336, 2), ("qwen", 2048, 1408, 4))
        for which, outputs, inputs, choices in (
            ("first", 2 * intermediate, hidden, k),
            ("second", hidden, intermediate, 1),
        )
        for form, group, x_scaled in kinds
        for dtype in ("bf16", "fp32")
        if dtype == "bf16" or (name == "qwen" and not x_scaled)
    ]


def _variant(
    name: str, dtype: str, outputs: int, inputs: int, choices: int, form: str, group: int | None, x_scaled: bool
) -> Variant:
    constants, num_stages = _constants(form, group, inputs, outputs, BLOCK_ROWS, is_float32=dtype == "fp32")
    kind = f"{form}{f' groups of {group}' if group else ''}{', int8 rows' if x_scaled else ''}"
    return Variant(
        name=f"moe linear {name} {dtype} {kind}",
        kernel=_grouped_quantized,
        arguments={
            "x": "*i8" if x_scaled else f"*{dtype}",
            "weight": {"int8": "*i8", "fp8": "*i8"}.get(form, "*u8"),
            **dict.fromkeys(("scale", "offset", "x_scale"), "*fp32"),
            "bias": f"*{dtype}",
            "sorted_pairs": "*i32",
            "block_experts": "*i32",
            "pair_weights": "*fp32",
            "out": f"*{dtype}",
            **dict.fromkeys(("in_features", "part", "num_groups", "row_bytes"), "i32"),
        },
        constants=constants
        | {"HAS_OFFSET": group is not None, "X_SCALED": x_scaled, "CHOICES": choices}
        | {"HAS_BIAS": False, "WEIGHTED": choices == 1},
        aligned=("in_features", "part", "row_bytes"),
        num_stages=num_stages,
        matrix=dtype != "fp32",
    )
