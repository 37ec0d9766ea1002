"""The bytes that linears' weights and quantized caches are kept as, and the numbers that they stand for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import GREATEST, LEAST, KvPlanes

_LEAST = tl.constexpr(LEAST)
_INT8_GREATEST = tl.constexpr(GREATEST["int8"])
_FP8_GREATEST = tl.constexpr(GREATEST["fp8"])


@triton.jit
def decode(codes, FORM: tl.constexpr, PART: tl.constexpr):
    """Bytes -> the numbers they stand for, float32, without conversions of integers, of which a GPU does few."""
    bits = codes.to(tl.int32)
    if FORM == "int8":
        return ((bits ^ 0x80) & 0xFF | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    if FORM == "int4":
        return (bits >> 4 * PART & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8
    if FORM == "fp8":
        return ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return ((bits & 0x20) << 26 | (bits & 0x1F) << 21).to(tl.float32, bitcast=True) * 2.1267647932558654e37  # 2^124


@triton.jit
def encode(x, FORM: tl.constexpr):
    """float32 up to the greatest of a cache's form, or a little more, which is rounded to it -> int8 elements; in int8,
    NaN -> 0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if FORM == "int8":  # adding 1.5 * 2^23 rounds to an integer in the low bits
        return tl.where(magnitude > 0x7F800000, 0, (x + 12582912.0).to(tl.int32, bitcast=True)).to(tl.int8)
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) >> 20) - (120 << 3)
    # adding 2^14 rounds to multiples of 2^-9, the least number there is
    fixed = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, fixed, rounded)  # 2^-6: numbers below it have no exponent
    return (tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def most_of(rows):
    """[rows, columns] float32 -> [rows], the greatest magnitude; NaNs are above all, as bits without a sign are."""
    most = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return most.to(tl.float32, bitcast=True)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def scale_of(most, FORM: tl.constexpr):
    """A row's scale in a cache of this form, and what its numbers are multiplied by on their way to `encode`."""
    greatest: tl.constexpr = _INT8_GREATEST if FORM == "int8" else _FP8_GREATEST
    most = tl.where(most < _LEAST, 0.0, most)
    inverse = tl.where(most > 0, tl.math.div_rn(1.0, tl.where(most > 0, most, 1.0)) * greatest, 0.0)
    return tl.math.div_rn(most, greatest), inverse


SCALES: tuple[str, ...] = ("k_scales", "v_scales")
SCALE_STRIDES: tuple[str, ...] = (
    "k_scale_block",
    "k_scale_head",
    "v_scale_block",
    "v_scale_head",
    "k_scale_token",
    "v_scale_token",
)


def scale_arguments(cache: KvPlanes) -> tuple[Tensor | int | None, ...]:
    """What a kernel's SCALES and SCALE_STRIDES are; of a plain cache nothing, which is a constant."""
    if cache.key_scales is None or cache.value_scales is None:
        return (None,) * len(SCALES + SCALE_STRIDES)
    keys, values = cache.key_scales.stride(), cache.value_scales.stride()
    return cache.key_scales, cache.value_scales, *keys[:2], *values[:2], keys[2], values[2]


def scale_types(form: str) -> tuple[dict[str, str], dict[str, int | None]]:
    """The same for a Variant: its arguments, and its constants. The scales of a plane lie side by side."""
    if form == "plain":
        return {}, dict.fromkeys(SCALES + SCALE_STRIDES)
    types = dict.fromkeys(SCALES, "*fp32") | dict.fromkeys(SCALE_STRIDES[:4], "i32")
    return types, dict.fromkeys(SCALE_STRIDES[4:], 1)
