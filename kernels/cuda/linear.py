"""Linear layers: tiles of fixed size, their products summed in one order whatever the number of rows.

The weight is the left operand, so that a tile is 64 or 128 outputs by 32 rows or more: a step of one sequence pads its
row to 32, and integers become floats in the registers that the matrix units read.

Input features are summed 64 at a time, from zero, within each of several ranges, and the ranges then in order. How many
there are depends on the shape of the weight alone, or of the linear that it has some outputs of. With few rows programs
compute a range each, and `_add_ranges` adds them; with many a program computes them all: the same sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.elements import decode, encode, most_of, scale_of
from kernels.cuda.rows import PARTS, part_features
from kernels.cuda.tile import dot, launch, narrow
from kernels.cuda.variant import Variant

FEATURES = 64  # summed at a time
_FEATURES = tl.constexpr(FEATURES)
_SPLIT_FEATURES = 256  # of a range at least
_PROGRAMS = 256  # that a weight is to be spread over where one row is computed
_FEW_PROGRAMS = 132  # below which ranges are computed side by side
_ADDED_OUTPUTS = 512  # of a program that adds ranges


class _Tile(NamedTuple):
    """outputs x rows of a program."""

    outputs: int
    rows: int
    num_warps: int
    num_stages: int


_ALL_ROWS = 1 << 31
# By the greatest number of rows. Reasoned, not measured: of a step's tiles many bytes are to be on their way.
_TILES = {32: _Tile(64, 32, 4, 4), 64: _Tile(64, 64, 4, 3), _ALL_ROWS: _Tile(128, 128, 8, 3)}
_FP6_TILES = {_ALL_ROWS: _Tile(64, 32, 4, 2)}  # four parts at once
_FLOAT32_TILES = {_ALL_ROWS: _Tile(32, 16, 4, 2)}  # no matrix units: products and sums in registers


def _tiles(form: str, dtype: torch.dtype) -> dict[int, _Tile]:
    return _FLOAT32_TILES if dtype == torch.float32 else _FP6_TILES if form == "fp6" else _TILES


@triton.jit
def weight_tile(
    weight, scale, offset, outputs, start, in_features, part, num_groups,
    FORM: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_OFFSET: tl.constexpr,
    OUT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The features from `start` of a part: [OUTPUTS, 64]. RUN features next to each other share a scale."""
    if FORM == "plain":
        features = start + tl.arange(0, _FEATURES)
        within = (outputs[:, None] < OUT) & (features[None, :] < in_features)
        return tl.load(weight + outputs[:, None].to(tl.int64) * in_features + features[None, :], within, other=0.0)
    first = start + tl.arange(0, _FEATURES // RUN)[None, :, None] * RUN
    features = first + tl.arange(0, RUN)[None, None, :]
    outputs = outputs[:, None, None]
    within = (outputs < OUT) & (features < part)
    if FORM == "fp6":
        row = weight + outputs.to(tl.int64) * (3 * part)
        high = tl.load(row + (PART % 2) * part + features, within, other=0).to(tl.int32) >> 4 * (PART // 2) & 15
        low = tl.load(row + 2 * part + features, within, other=0).to(tl.int32) >> 2 * PART & 3
        values = decode(high << 2 | low, FORM, PART)
    else:
        values = decode(tl.load(weight + outputs.to(tl.int64) * part + features, within, other=0), FORM, PART)
    if GROUP > 0:
        first += PART * part
        present = (outputs < OUT) & (first < in_features)
        groups = outputs * num_groups + first // GROUP
        scales = tl.load(scale + groups, present, other=0.0)
        if HAS_OFFSET:  # noqa: SIM108
            values = tl.fma(values, scales, tl.load(offset + groups, present, other=0.0))
        else:
            values = values * scales
    return narrow(tl.reshape(values, [OUTPUTS, _FEATURES]), DTYPE)


@triton.jit
def finish(total, scale, x_scale, bias, outputs, rows, num_rows,
            SCALED: tl.constexpr, X_SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    """Sums -> y, float32 [outputs, rows]."""
    y = total.to(tl.float32)
    if SCALED:
        y = y * tl.load(scale + outputs, outputs < OUT, other=0.0)[:, None]
    if X_SCALED:
        y = y * tl.load(x_scale + rows, rows < num_rows, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + outputs, outputs < OUT, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x, weight, scale, offset, x_scale, bias, out, num_rows, in_features, part, num_groups, range_features,
    FORM: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_OFFSET: tl.constexpr,
    X_SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, OUT: tl.constexpr, RANGES: tl.constexpr, RANGE: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """RANGE: whether a program computes one of the RANGES, into out [RANGES, rows, OUT] float32, or all of them."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([OUTPUTS, ROWS], tl.int32 if X_SCALED else tl.float32)
    for index in range(1 if RANGE else RANGES):
        begin = (tl.program_id(2) if RANGE else index) * range_features
        end = tl.minimum(begin + range_features, part)
        acc = tl.zeros_like(total)
        for start in range(begin, end, _FEATURES):
            for p in tl.static_range(PARTS):
                features = p * part + start + tl.arange(0, _FEATURES)
                within = (rows[None, :] < num_rows) & (start + tl.arange(0, _FEATURES) < part)[:, None]
                within = within & (features[:, None] < in_features)
                tile = tl.load(x + rows[None, :].to(tl.int64) * in_features + features[:, None], within, other=0)
                if X_SCALED:
                    w_within = (outputs[:, None] < OUT) & (features[None, :] < in_features)
                    w_at = weight + outputs[:, None].to(tl.int64) * in_features + features[None, :]
                    acc = dot(tl.load(w_at, w_within, other=0), tile, acc)
                else:
                    w = weight_tile(
                        weight, scale, offset, outputs, start, in_features, part, num_groups,
                        FORM, p, GROUP, RUN, HAS_OFFSET, OUT, OUTPUTS, x.dtype.element_ty,
                    )  # fmt: skip
                    acc = dot(w, tile, acc)
        if RANGES == 1 or RANGE:
            total = acc
        else:
            total += acc
    within = (outputs < OUT)[:, None] & (rows < num_rows)[None, :]
    if RANGE:
        at = (tl.program_id(2).to(tl.int64) * num_rows + rows[None, :]) * OUT + outputs[:, None]
        tl.store(out + at, total, within)
    else:
        SCALED: tl.constexpr = FORM != "plain" and GROUP == 0
        y = finish(total, scale, x_scale, bias, outputs, rows, num_rows, SCALED, X_SCALED, HAS_BIAS, OUT)
        at = rows[None, :].to(tl.int64) * OUT + outputs[:, None]
        tl.store(out + at, narrow(y, out.dtype.element_ty), within)


@triton.jit(do_not_specialize=["num_rows"])
def _add_ranges(
    sums, scale, bias, out, num_rows,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, OUT: tl.constexpr, RANGES: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A program: OUTPUTS of a row."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) + tl.arange(0, 1)
    within = (outputs < OUT)[:, None] & (rows < num_rows)[None, :]
    at = rows[None, :].to(tl.int64) * OUT + outputs[:, None]
    total = tl.zeros([OUTPUTS, 1], tl.float32)
    for index in tl.static_range(RANGES):
        total += tl.load(sums + index * num_rows.to(tl.int64) * OUT + at, within, other=0.0)
    y = finish(total, scale, scale, bias, outputs, rows, num_rows, SCALED, False, HAS_BIAS, OUT)
    tl.store(out + at, narrow(y, out.dtype.element_ty), within)


@triton.jit
def _quantize_rows(x, out, scale, width, WIDTH: tl.constexpr):
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, WIDTH)[None, :]
    at = row[:, None].to(tl.int64) * width + columns
    values = tl.load(x + at, columns < width, other=0.0).to(tl.float32)
    step, inverse = scale_of(most_of(values), "int8")
    tl.store(out + at, encode(values * inverse[:, None], "int8"), columns < width)
    tl.store(scale + row, step)


def linear(
    x: Tensor,
    form: str,
    weight: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    group: int | None = None,
    x_scale: Tensor | None = None,
    of_outputs: int | None = None,
) -> None:
    """weight: [out_features, bytes or floats of a row], its form a key of PARTS; scale, offset [out, groups] float32.

    group: features that share a scale, None = all of a row. x_scale [rows] float32: x is int8, and so is the weight,
    one scale for each of its rows. of_outputs: of the linear that the weight is some outputs of; default: it is all.
    """
    (num_rows, in_features), out_features = x.shape, out.shape[1]
    part, num_groups = part_features(form, in_features), 1 if scale is None else scale.shape[1]
    if group is None and offset is not None:
        group = in_features
    tile = next(tile for most, tile in _tiles(form, x.dtype).items() if num_rows <= most)
    ranges, range_features = _ranges(of_outputs or out_features, part)
    if x_scale is not None:
        ranges, range_features = 1, part
    grid = (triton.cdiv(out_features, tile.outputs), triton.cdiv(num_rows, tile.rows))
    split = ranges > 1 and grid[0] * grid[1] < _FEW_PROGRAMS
    sums = torch.empty(ranges, num_rows, out_features, device=x.device) if split else out
    given = {"offset": offset is not None, "x_scaled": x_scale is not None, "bias": bias is not None}
    constants = _constants(form, group, in_features, out_features, ranges, split, tile, **given)
    arguments = x, weight, scale, offset, x_scale, bias, sums, num_rows, in_features, part, num_groups, range_features
    grid = (*grid, ranges if split else 1)
    launch(_linear, grid, *arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
    if split:
        same = {name: constants[name] for name in ("HAS_BIAS", "OUT", "RANGES")}
        scaled = form != "plain" and group is None
        grid = (triton.cdiv(out_features, _ADDED_OUTPUTS), num_rows)
        launch(_add_ranges, grid, sums, scale, bias, out, num_rows, SCALED=scaled, OUTPUTS=_ADDED_OUTPUTS, **same)


def cublas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same of a plain weight, in an order that is cuBLAS's to choose."""
    if out.dtype == x.dtype:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    if bias is not None:
        out += bias


def _row_warps(width: int) -> int:
    return min(max(width // 512, 1), 16)


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """x [rows, width] -> int8 out, float32 scale [rows], as kernels/kv_format.py has them: x is about scale * out."""
    width = triton.next_power_of_2(x.shape[1])
    launch(_quantize_rows, (x.shape[0],), x, out, scale, x.shape[1], WIDTH=width, num_warps=_row_warps(width))


def _ranges(out_features: int, part: int) -> tuple[int, int]:
    """How many, and of how many features of a part."""
    programs = triton.cdiv(out_features, 64)
    wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS, programs))
    ranges = max(1, min(wanted, part // _SPLIT_FEATURES))
    features = triton.cdiv(triton.cdiv(part, ranges), FEATURES) * FEATURES
    return triton.cdiv(part, features), features


def features_of_a_scale(group: int | None, part: int) -> int:
    """Features of 64 that are known to share one, side by side."""
    run = FEATURES
    while group and run > 1 and (group % run or part % run):
        run //= 2
    return run


def _constants(
    form: str, group: int | None, in_features: int, out_features: int, ranges: int, split: bool, tile: _Tile,
    *, offset: bool, x_scaled: bool, bias: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "FORM": form,
        "PARTS": PARTS[form],
        "GROUP": group or 0,
        "RUN": features_of_a_scale(group, part_features(form, in_features)),
        "HAS_OFFSET": offset,
        "X_SCALED": x_scaled,
        "HAS_BIAS": bias,
        "OUT": out_features,
        "RANGES": ranges,
        "RANGE": split,
        "OUTPUTS": tile.outputs,
        "ROWS": tile.rows,
    }


def variants(capability: int) -> list[Variant]:
    """SmolLM2-135M's and Llama-3.1-8B's linears in each form; in float16, which has bfloat16's tiles, some of them."""
    kinds = [("plain", None, False), ("int8", None, False), ("int8", None, True), ("int4", 32, False)]
    kinds += [("int4", 128, False), ("fp8", None, False), ("fp6", None, False)]
    found = [
        _variant(dtype, out, in_features, form, group, x_scaled, split, tile)
        for out, in_features in ((960, 576), (4096, 4096), (28672, 4096))
        for form, group, x_scaled in kinds
        for dtype in ("bf16", "fp16", "fp32")
        for most, tile in _tiles(form, torch.float32 if dtype == "fp32" else torch.bfloat16).items()
        for split in (False, True)
        if in_features % (group or 1) == 0
        and _is_chosen(out, part_features(form, in_features), most, split, tile)
        and (dtype == "bf16" or (not x_scaled and (out == 4096 if dtype == "fp16" else in_features == 576)))
    ]
    found += [
        Variant(
            name=f"add_ranges bf16 {ranges}",
            kernel=_add_ranges,
            arguments={"sums": "*fp32", "scale": "*fp32", "bias": "*bf16", "out": "*bf16", "num_rows": "i32"},
            constants={"SCALED": True, "HAS_BIAS": True, "OUT": 4096, "RANGES": ranges, "OUTPUTS": _ADDED_OUTPUTS},
        )
        for ranges in (2, 4, 16)
    ]
    found += [
        Variant(
            name=f"quantize_rows bf16 {width}",
            kernel=_quantize_rows,
            arguments={"x": "*bf16", "out": "*i8", "scale": "*fp32", "width": "i32"},
            constants={"WIDTH": width},
            aligned=("width",),
            num_warps=_row_warps(width),
        )
        for width in (1024, 4096, 16384)
    ]
    return found


def _is_chosen(out_features: int, part: int, most_rows: int, split: bool, tile: _Tile) -> bool:
    """Whether `linear` would ever take this tile so. int8 rows, which have no ranges, do as others here."""
    ranges, _ = _ranges(out_features, part)
    programs = triton.cdiv(out_features, tile.outputs)
    if split:
        return ranges > 1 and programs < _FEW_PROGRAMS
    return ranges == 1 or programs * triton.cdiv(most_rows, tile.rows) >= _FEW_PROGRAMS


def _variant(
    dtype: str, out: int, in_features: int, form: str, group: int | None, x_scaled: bool, split: bool, tile: _Tile
) -> Variant:
    part = part_features(form, in_features)
    ranges = 1 if x_scaled else _ranges(out, part)[0]
    stored = {"plain": f"*{dtype}", "int8": "*i8", "fp8": "*i8"}.get(form, "*u8")
    kind = f"{form}{f' groups of {group}' if group else ''}{', int8 rows' if x_scaled else ''}"
    return Variant(
        name=f"linear {dtype} {out} x {in_features} {kind}, tile {tile.outputs} x {tile.rows}"
        f"{f', {ranges} ranges' if ranges > 1 else ''}{' side by side' if split else ''}",
        kernel=_linear,
        arguments={
            "x": "*i8" if x_scaled else f"*{dtype}",
            "weight": stored,
            "scale": "*fp32",
            "offset": "*fp32",
            "x_scale": "*fp32",
            "bias": f"*{dtype}",
            "out": "*fp32" if split else f"*{dtype}",
            "num_rows": "i32",
            "in_features": "i32",
            "part": "i32",
            "num_groups": "i32",
            "range_features": "i32",
        },
        constants=_constants(
            form, group, in_features, out, ranges, split, tile, offset=bool(group), x_scaled=x_scaled, bias=False
        ),
        aligned=("in_features", "part", "range_features"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=dtype != "fp32",
    )
