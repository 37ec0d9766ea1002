"""Linear layers whose rows never notice each other.

    y = x @ weight.T + bias

x       [rows, in_features], contiguous, of the weight's dtype
weight  [out_features, in_features], float32 or bfloat16, packed once into a LinearWeight, perhaps quantized
bias    [out_features], the weight's dtype, or None
y       [rows, out_features]; computed in float32 and rounded once

torch's own linear picks another routine for few rows, and with it another order of summation: measured in float32, 1 to
3 rows differ from 4 and more. kernels/cpu/linear.c sums an output in one order whatever the number of rows and threads.

On a CPU with AVX-512 BF16, bfloat16 rows go to kernels/cpu/linear_pairs.c, whose dot products of pairs are several
times faster. Its bits are those of linear.c, but for int4 and denormals. oneDNN's packed bfloat16 linear is no choice:
on Zen 4 it was measured to give one row other bits than many. `probe_row_invariance` checks the machine at hand.

A quantized weight is kept as integers of 8 or 4 bits, and multiplied in float32 by activations that stay what they are:

    w = scale * q + offset        a scale, and an offset unless symmetric, for each output and group of input features

One row reads the whole weight and computes little with it, so half the bytes are half the time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_INTEGERS = {8: 2, 4: 3}  # dtypes of panels of so many bits
_WORD = 8  # input features of an int4 word
_QUANTIZED_ROWS = 1024  # quantized at once, in float64
_PACKINGS = {False: "panels, float32 products", True: "pairs, bfloat16 products"}
_PANEL_WIDTH = 32  # output features side by side
# The outputs of an int8 panel of pairs, which unpacking bytes brings back in order.
_UNPACKED = [4 * lane + 16 * half + i for lane in range(4) for half in range(2) for i in range(4)]
_PROBE_ROWS = (1, 2, 5, 10, 17)


@dataclass(frozen=True)
class Quantization:
    """How a weight becomes integers, each rounded to the nearest.

    group: input features that share a scale, a multiple of 8; None = all of a row.
    symmetric: scale = max|w| / (2^(bits - 1) - 1) and no offset; else the integers reach from the group's least weight
    to its greatest.
    Raises ValueError for bits or a group that there are no panels for.
    """

    bits: Literal[8, 4]
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _INTEGERS:
            raise ValueError(f"bits must be 8 or 4, got {self.bits}")
        if self.group is not None and (self.group < 1 or self.group % _WORD):
            raise ValueError(f"group must be a multiple of {_WORD} input features, got {self.group}")


@dataclass(frozen=True)
class Integers:
    """A weight that is quantized already: scale * values + offset. Raises ValueError for parts that do not fit."""

    bits: Literal[8, 4]
    values: Tensor  # int8 [out, in]; of 4 bits from -8 to 7
    scale: Tensor  # float32 [out, groups]
    offset: Tensor | None = None  # float32 [out, groups]

    def __post_init__(self) -> None:
        parts = (self.scale, *(() if self.offset is None else (self.offset,)))
        groups = self.scale.shape[-1]
        if self.values.dtype != torch.int8 or self.values.dim() != 2 or not groups or self.values.shape[1] % groups:
            raise ValueError(f"values must be int8 [out, in] in {groups} groups, got {list(self.values.shape)}")
        if any(part.dtype != torch.float32 or part.shape != (len(self.values), groups) for part in parts):
            raise ValueError(f"scale and offset must be float32 [{len(self.values)}, {groups}]")

    @property
    def quantization(self) -> Quantization:
        """How it was made: what another weight must have been to be joined to it."""
        return _quantization_of(self.bits, self.values.shape[1], self.scale, self.offset)


class LinearWeight:
    """A weight [out, in] with its bias, packed for the CPU. The packed copy replaces the original, which may be freed.

    `dtype`: of x, and what y is rounded to; the weight's own before it was quantized.
    Raises ValueError for a weight, bias or group that breaks the contract.
    """

    FIELDS = ("packed", "scale", "offset", "bias")  # of `tensors`

    def __init__(self, weight: Tensor, bias: Tensor | None = None, quantization: Quantization | None = None) -> None:
        if weight.device.type != "cpu":
            raise ValueError(f"linear runs on: cpu; got a weight on {weight.device}")
        if weight.dim() != 2 or not weight.shape[1] or weight.dtype not in _DTYPES:
            raise ValueError(f"weight must be float32 or bfloat16 [out, in], got {weight.dtype} {list(weight.shape)}")
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
            raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
        group = (quantization and quantization.group) or weight.shape[1]
        if weight.shape[1] % group:
            raise ValueError(f"{weight.shape[1]} input features cannot be cut into groups of {group}")
        if quantization is not None:
            self._take_integers(_quantize(weight.detach(), group, quantization), bias, weight.dtype)
            return
        self._take_shape(weight.shape, weight.dtype, None)
        self.packed = self._pack(weight.detach())
        self.scale = self.offset = None  # [ceil(out / 32), groups, 32]
        self.bias = None if bias is None else bias.detach().contiguous()

    @classmethod
    def of_integers(cls, integers: Integers, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
        """A weight that comes quantized. dtype: of x, and of bias."""
        weight = cls.__new__(cls)
        weight._take_integers(integers, bias, dtype)
        return weight

    def _take_integers(self, integers: Integers, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._take_shape(integers.values.shape, dtype, integers.quantization)
        self.packed = self._pack(integers.values)
        self.scale = _pack_panels(integers.scale)
        self.offset = None if integers.offset is None else _pack_panels(integers.offset)
        self.bias = None if bias is None else bias.detach().contiguous()

    def _take_shape(self, shape: Sequence[int], dtype: torch.dtype, quantization: Quantization | None) -> None:
        self.dtype, self.quantization = dtype, quantization
        self.out_features, self.in_features = shape
        self.group = (quantization and quantization.group) or self.in_features  # input features that share a scale
        self._pairs = has_pairs(dtype)

    @property
    def description(self) -> str:
        """How it is packed, for logs and errors."""
        if self.quantization is not None:
            size = "rows" if self.quantization.group is None else f"groups of {self.quantization.group}"
            kind = "symmetric" if self.quantization.symmetric else "with offsets"
            return f"int{self.quantization.bits} {_PACKINGS[self._pairs]}, {size}, {kind}"
        return f"{str(self.dtype).removeprefix('torch.')} {_PACKINGS[self._pairs]}"

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, to be stored."""
        fields = {field: getattr(self, field) for field in self.FIELDS}
        return {field: tensor for field, tensor in fields.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> LinearWeight:
        """The weight that `tensors` came from, over the same memory. Raises KeyError if it came from none.

        shape: [out, in]; dtype: as it had it.
        """
        weight = cls.__new__(cls)
        weight.packed = tensors["packed"]
        weight.scale, weight.offset, weight.bias = (tensors.get(field) for field in cls.FIELDS[1:])
        quantization = None
        if weight.scale is not None:
            bits = 4 if weight.packed.dtype == torch.int32 else 8
            quantization = _quantization_of(bits, shape[1], weight.scale, weight.offset)
        weight._take_shape(shape, dtype, quantization)
        return weight

    @property
    def num_bytes(self) -> int:
        """What one row reads: the packed weight, scales, offsets and bias."""
        return sum(
            t.numel() * t.element_size() for t in (self.packed, self.scale, self.offset, self.bias) if t is not None
        )

    def dequantize(self) -> Tensor:
        """The weight that the arithmetic stands for, float32 [out, in]. ValueError where nothing was quantized."""
        if self.quantization is None or self.scale is None:
            raise ValueError(f"{self.description}: not quantized")
        integers = self._unpack()
        weight = _unpack_panels(self.scale, self.out_features)[:, :, None] * integers.unflatten(1, (-1, self.group))
        if self.offset is not None:
            weight += _unpack_panels(self.offset, self.out_features)[:, :, None]
        return weight.flatten(1).contiguous()

    def _pack(self, values: Tensor) -> Tensor:
        """[out, in] as its op reads it."""
        if values.dtype == torch.int8 and self.quantization and self.quantization.bits == 4:
            return _pack_panels(_words(values, self._shifts()))
        if not self._pairs:
            return _pack_panels(values)
        panels = _pack_panels(functional.pad(values, (0, values.shape[1] % 2)))
        pairs = panels.unflatten(1, (-1, 2)).transpose(2, 3)  # [panels, pairs, 32, 2]
        return (pairs if values.dtype != torch.int8 else pairs[:, :, _UNPACKED]).contiguous()

    def _unpack(self) -> Tensor:
        """The integers that `_pack` was given."""
        panels = self.packed
        if self.quantization and self.quantization.bits == 4:
            words = _unpack_panels(panels, self.out_features)
            return ((words[:, :, None] >> self._shifts() & 15) - 8).flatten(1)[:, : self.in_features]
        if self._pairs:
            pairs = torch.empty_like(panels)
            pairs[:, :, _UNPACKED] = panels
            panels = pairs.transpose(2, 3).flatten(1, 2)
        return _unpack_panels(panels, self.out_features)[:, : self.in_features]

    def _shifts(self) -> Tensor:
        """Where an int4 word has each of its input features: in order, or the second of a pair in the upper half."""
        shifts = [4 * (i // 2) + 16 * (i % 2) if self._pairs else 4 * i for i in range(_WORD)]
        return torch.tensor(shifts, dtype=torch.int32)


def has_pairs(dtype: torch.dtype) -> bool:
    """Whether rows of that dtype go to this CPU's dot products of pairs."""
    return dtype == torch.bfloat16 and _cpu_has_pairs()


def packing(dtype: torch.dtype) -> str:
    """The form that weights for rows of that dtype are packed in."""
    return _PACKINGS[has_pairs(dtype)]


def linear(x: Tensor, weight: LinearWeight, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias -> [rows, out_features] of x's dtype, or `out`, which may also be float32.

    Raises ValueError when a tensor breaks the contract.
    """
    if x.dtype != weight.dtype or x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous {weight.dtype} [rows, {weight.in_features}], got {x.dtype} {list(x.shape)}"
        )
    rows = x.shape[0]
    if out is None:
        out = torch.empty(rows, weight.out_features, dtype=x.dtype)
    elif (
        out.dtype not in (x.dtype, torch.float32) or out.shape != (rows, weight.out_features) or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous {x.dtype} or float32 [{rows}, {weight.out_features}], "
            f"got {out.dtype} {list(out.shape)}"
        )
    failed = library.call(
        "tandem_linear_pairs" if weight._pairs else "tandem_linear",
        x.data_ptr(), weight.packed.data_ptr(), _address(weight.scale), _address(weight.offset), _address(weight.bias),
        out.data_ptr(), rows, weight.in_features, weight.out_features, weight.group,
        _DTYPES[x.dtype], _INTEGERS[weight.quantization.bits] if weight.quantization else _DTYPES[weight.dtype],
        _DTYPES[weight.dtype], _DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {rows} rows of {weight.in_features} features")
    return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch, in the dtype of its inputs."""
    return functional.linear(x, weight, bias)


def probe_row_invariance(weight: LinearWeight) -> None:
    """Checks at start-up that rows keep their bits among other numbers of rows, first or last in the batch.

    Raises RuntimeError naming the row counts that differ.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_PROBE_ROWS), weight.in_features, generator=generator).to(weight.dtype)
    expected = linear(x, weight)
    differing = [
        rows
        for rows in _PROBE_ROWS
        if not torch.equal(linear(x[:rows], weight), expected[:rows])
        or not torch.equal(linear(x[-rows:], weight), expected[-rows:])
    ]
    if differing:
        raise RuntimeError(
            f"linear ({weight.description}, {weight.out_features} x {weight.in_features}) gives other bits for "
            f"{differing} rows than for {max(_PROBE_ROWS)}: "
            "this CPU or torch build cannot keep outputs independent of the batch"
        )


@functools.cache
def _cpu_has_pairs() -> bool:
    return library.instruction_set() == "AVX-512 BF16"


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _quantization_of(bits: Literal[8, 4], in_features: int, scale: Tensor, offset: Tensor | None) -> Quantization:
    """scale: [outputs or panels, groups, ...]"""
    groups = scale.shape[1]
    return Quantization(bits, None if groups == 1 else in_features // groups, offset is None)


def _quantize(weight: Tensor, group: int, quantization: Quantization) -> Integers:
    """[out, in] as integers.

    Integers lie around zero, with an offset to match, so that sums of them stay small; int8 goes without -128.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), weight.shape[1] // group)
    offset = None if quantization.symmetric else torch.empty_like(scale)
    top = 2 ** (quantization.bits - 1) - 1
    bottom = -top - 1 if quantization.bits == 4 and not quantization.symmetric else -top
    for start in range(0, len(weight), _QUANTIZED_ROWS):
        rows = slice(start, start + _QUANTIZED_ROWS)
        groups = weight[rows].double().unflatten(1, (-1, group))
        if offset is None:
            scale[rows] = groups.abs().amax(2) / top
        else:
            low, high = groups.aminmax(dim=2)
            scale[rows] = (high - low) / (top - bottom)
            offset[rows] = low - scale[rows] * bottom
            groups -= offset[rows, :, None]
        # of the numbers that are kept; a group without a scale is zeros, or its offset
        groups /= torch.where(scale[rows] > 0, scale[rows], torch.inf)[:, :, None]
        integers[rows] = groups.round_().clamp_(bottom, top).flatten(1)
    return Integers(quantization.bits, integers, scale, offset)


def _words(integers: Tensor, shifts: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 8)], 4 bits of each + 8 where `shifts` says."""
    padded = functional.pad(integers, (0, -integers.shape[1] % _WORD)).add(8).to(torch.int32)
    return (padded.unflatten(1, (-1, _WORD)) << shifts).sum(2, dtype=torch.int32)


def _unpack_panels(panels: Tensor, outputs: int) -> Tensor:
    """[ceil(out / 32), in, 32] -> [out, in]."""
    return panels.transpose(1, 2).flatten(0, 1)[:outputs]


def _pack_panels(weight: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / 32), in, 32], filled up with zeros."""
    outputs, inputs = weight.shape
    panels = torch.zeros(-(-outputs // _PANEL_WIDTH) * _PANEL_WIDTH, inputs, dtype=weight.dtype)
    panels[:outputs] = weight
    return panels.view(-1, _PANEL_WIDTH, inputs).transpose(1, 2).contiguous()
