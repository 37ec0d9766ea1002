"""Weights as few bits: integers, or small floats, with a scale for each output and group of input features.

w = scale * q + offset        an offset where integers are not symmetric

int8, int4   q an integer, rounded to the nearest
fp8          q = e4m3: +-448 at most (Micikevicius et al. 2022, arXiv:2209.05433)
fp6          q = e3m2: +-28 at most, without infinities (OCP Microscaling Formats 1.0)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # weights that are float64 at once
_FORMS = {(8, False): "int8", (4, False): "int4", (8, True): "fp8", (6, True): "fp6"}


@dataclass(frozen=True)
class Quantization:
    """How a weight becomes few bits, each number rounded to the nearest.

    group: input features that share a scale, any number that divides a row; None = all of a row. On a CPU a group that
    is no multiple of 8 (of fp6: of 16) is filled up to one.
    symmetric: the greatest of a group is the format's greatest, and there is no offset; else the integers reach from
    the group's least weight to its greatest.
    floating: bits 8 are e4m3, bits 6 e3m2.
    dynamic: rows of activations become int8 too, each with a scale of its own: int8, symmetric, a row a group.
    Raises ValueError for what no op computes.
    """

    bits: Literal[8, 6, 4]
    group: int | None = None
    symmetric: bool = True
    floating: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if (self.bits, self.floating) not in _FORMS:
            known = "8 or 6 of a float" if self.floating else "8 or 4"
            raise ValueError(f"bits must be {known}, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be 1 input feature or more, got {self.group}")
        if self.floating and not self.symmetric:
            raise ValueError("floats are symmetric: they have no offset")
        if self.dynamic and (self.form != "int8" or not self.symmetric or self.group is not None):
            raise ValueError("dynamic activations need a symmetric int8 weight with a scale for each row")

    @property
    def form(self) -> str:
        """int8, int4, fp8 or fp6."""
        return _FORMS[self.bits, self.floating]

    def as_tensor(self) -> Tensor:
        """int64 [5], to be stored beside what it says of."""
        return torch.tensor([self.bits, self.group or 0, self.symmetric, self.floating, self.dynamic])

    @classmethod
    def of_tensor(cls, stored: Tensor) -> Quantization:
        """What gave this tensor. ValueError for another."""
        if stored.shape != (5,):
            raise ValueError(f"a quantization is stored as 5 numbers, got {list(stored.shape)}")
        bits, group, symmetric, floating, dynamic = stored.tolist()
        return cls(bits, group or None, bool(symmetric), bool(floating), bool(dynamic))


@dataclass(frozen=True)
class Integers:
    """A weight that is quantized already: scale * values + offset. Raises ValueError for parts that do not fit."""

    bits: Literal[8, 6, 4]
    values: Tensor  # int8 [out, in]; of 4 bits from -8 to 7
    scale: Tensor  # float32 [out, groups]
    offset: Tensor | None = None  # float32 [out, groups]
    floating: bool = False  # values are not integers but the bits of floats, of 8 or 6

    def __post_init__(self) -> None:
        parts = (self.scale, *(() if self.offset is None else (self.offset,)))
        groups = self.scale.shape[-1]
        if self.values.dtype != torch.int8 or self.values.dim() != 2 or not groups or self.values.shape[1] % groups:
            raise ValueError(f"values must be int8 [out, in] in {groups} groups, got {list(self.values.shape)}")
        if any(part.dtype != torch.float32 or part.shape != (len(self.values), groups) for part in parts):
            raise ValueError(f"scale and offset must be float32 [{len(self.values)}, {groups}]")
        Quantization(self.bits, None, self.offset is None, self.floating)  # which raises for a form that is none

    @property
    def quantization(self) -> Quantization:
        """How it was made: what another weight must have been to be joined to it."""
        groups = self.scale.shape[1]
        group = None if groups == 1 else self.values.shape[1] // groups
        return Quantization(self.bits, group, self.offset is None, self.floating)

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        numbers = floats_of(self.values, self.quantization.form) if self.floating else self.values.float()
        groups = numbers.unflatten(1, (self.scale.shape[1], -1)) * self.scale[:, :, None]
        if self.offset is not None:
            groups += self.offset[:, :, None]
        return groups.flatten(1)


class Quantized(NamedTuple):
    """values: int8 [out, in], integers or the bits of floats; scale, offset: float32 [out, groups]."""

    values: Tensor
    scale: Tensor
    offset: Tensor | None


def quantize(weight: Tensor, quantization: Quantization) -> Quantized:
    """A weight [out, in] as few bits.

    Integers lie around zero, with an offset to match, so that sums of them stay small; int8 goes without -128.
    """
    group = quantization.group or weight.shape[1]
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), weight.shape[1] // group, device=weight.device)
    offset = None if quantization.symmetric else torch.empty_like(scale)
    top = 2 ** (quantization.bits - 1) - 1
    bottom = -top - 1 if quantization.bits == 4 and not quantization.symmetric else -top
    floats = _magnitudes(quantization.form).to(weight.device) if quantization.floating else None
    greatest = top if floats is None else float(floats[-1])
    step = max(_AT_ONCE // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        groups = weight[rows].double().unflatten(1, (-1, group))
        if offset is None:
            scale[rows] = groups.abs().amax(2) / greatest
        else:
            low, high = groups.aminmax(dim=2)
            scale[rows] = (high - low) / (top - bottom)
            offset[rows] = low - scale[rows] * bottom
            groups -= offset[rows, :, None]
        # of the numbers that are kept; a group without a scale is zeros, or its offset
        groups /= torch.where(scale[rows] > 0, scale[rows], torch.inf)[:, :, None]
        if floats is None:
            values[rows] = groups.round_().clamp_(bottom, top).flatten(1)
        else:
            values[rows] = _nearest(groups, floats).flatten(1)
    return Quantized(values, scale, offset)


def floats_of(bits: Tensor, form: str) -> Tensor:
    """Bits of fp8 or fp6, int8 -> the numbers, float32."""
    magnitudes = _magnitudes(form).to(bits.device)
    sign, magnitude = bits.int() & _sign_bit(magnitudes), bits.int() & _sign_bit(magnitudes) - 1
    return torch.where(sign > 0, -magnitudes[magnitude], magnitudes[magnitude]).float()


def _nearest(values: Tensor, magnitudes: Tensor) -> Tensor:
    """The bits of the nearest floats, of two the one whose last bit is 0: int8 of values' shape."""
    between, size = (magnitudes[1:] + magnitudes[:-1]) / 2, values.abs()
    lower = torch.bucketize(size, between, out_int32=True)
    in_the_middle = size == between[lower.clamp(max=len(between) - 1)]
    nearest = lower + (in_the_middle & (lower % 2 == 1))
    return (nearest + (values < 0) * _sign_bit(magnitudes)).to(torch.uint8).view(torch.int8)


def _sign_bit(magnitudes: Tensor) -> int:
    return 1 << (len(magnitudes) - 1).bit_length()


@functools.cache
def _magnitudes(form: str) -> Tensor:
    """What the bits without the sign stand for, ascending, float64."""
    exponent_bits, mantissa_bits = {"fp8": (4, 3), "fp6": (3, 2)}[form]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    numbers = [
        (exponent > 0) * 2.0 ** (exponent - bias) + mantissa / steps * 2.0 ** (max(exponent, 1) - bias)
        for exponent in range(2**exponent_bits)
        for mantissa in range(steps)
    ]
    # of e4m3 the last is NaN
    return torch.tensor(numbers[:-1] if form == "fp8" else numbers, dtype=torch.float64)
