"""Weights that are stored as integers, or as floats of few bits, with their scales, in the three ways of files.

A pair      DeepSpeed's: [int8 tensor [out, in], scales], one scale for each row, in a state dict
Named parts `name` int8 [out, in], `name.scale` and perhaps `name.offset` [out, groups], where a table says so: of
            each name the bits of its integers, 8 or 4, or the name of its floats, fp8 or fp6, whose bits are the int8
Blocks      GGUF's (gguf.py)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from kernels.quantization import Integers, Quantization
from shared.checkpoint.contract import CheckpointError

Parameter = Tensor | Integers
Form = Literal[8, 4, "fp8", "fp6"]  # as the table has it
_FORMS: dict[Form, tuple[Literal[8, 6, 4], bool]] = {8: (8, False), 4: (4, False), "fp8": (8, True), "fp6": (6, True)}
SCALE, OFFSET = ".scale", ".offset"  # after the name of the integers
# DeepSpeed keeps with the scales of the rows those of two halves, for a split; the integers were not rounded by them.
_SCALE_SETS = (1, 3)
_LEAST_GROUP = 8  # of fewer, the scales would be half as many bytes as the weight that was quantized, or more


def serves(integers: Integers, wanted: Quantization) -> bool:
    """Whether they are of the form that is wanted. Groups and offsets may be their own, where any are wanted."""
    if wanted.dynamic and integers.quantization != replace(wanted, dynamic=False):
        return False
    return (integers.bits, integers.floating) == (wanted.bits, wanted.floating)


def is_pair(value: object) -> TypeGuard[Sequence[Tensor]]:
    """Whether it is what DeepSpeed writes for a parameter that has scales: [tensor, scales]."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)


def of_pair(tensor: Tensor, scale: Tensor) -> Parameter:
    """What a pair stands for: a tensor that is no int8 was never quantized, and its scale is unset memory.

    Raises ValueError for scales that do not fit.
    """
    if tensor.dtype != torch.int8:
        return tensor
    if tensor.dim() != 2:
        raise ValueError(f"int8 with scales must be [out, in], got {list(tensor.shape)}")
    rows = len(tensor)
    flat = scale.detach().float().reshape(-1)
    # [scales, sets] is how it is stored, and not how it is ordered: the first set comes first in memory
    sets = scale.shape[1] if scale.dim() == 2 else 1
    count = scale.numel() // sets if sets else 0
    if sets not in _SCALE_SETS or not count or (count % rows and rows % count):
        raise ValueError(f"scales {list(scale.shape)} do not fit int8 {list(tensor.shape)}")
    first = flat[:count]
    # a scale for several rows, or several for a row
    scales = first.repeat_interleave(rows // count)[:, None] if count < rows else first.reshape(rows, -1)
    return Integers(8, tensor.detach(), scales.contiguous())


def as_parts(parameters: Mapping[str, Parameter]) -> tuple[dict[str, Tensor], dict[str, Form]]:
    """Tensors alone, integers as named parts; and the table of these.

    Raises CheckpointError if a part would take the name of another parameter.
    """
    tensors: dict[str, Tensor] = {}
    table: dict[str, Form] = {}
    for name, parameter in parameters.items():
        parts = {name: parameter} if isinstance(parameter, Tensor) else _parts(name, parameter)
        if taken := parts.keys() & (tensors.keys() | parameters.keys() - {name}):
            raise CheckpointError(f"{min(taken)} is the name of two tensors")
        if not isinstance(parameter, Tensor):
            table[name] = _form(parameter)
        tensors |= parts
    return tensors, table


def _form(integers: Integers) -> Form:
    return next(form for form, kind in _FORMS.items() if kind == (integers.bits, integers.floating))


def _parts(name: str, integers: Integers) -> dict[str, Tensor]:
    parts = {name: integers.values, name + SCALE: integers.scale, name + OFFSET: integers.offset}
    return {name: part for name, part in parts.items() if part is not None}


def checked_table(table: object, names: set[str], file: str) -> dict[str, Form]:
    """Which of `names` are integers, and in which form, from a file's metadata. CheckpointError if it cannot be."""
    if not isinstance(table, dict):
        raise CheckpointError(f"{file}: the table of integers is no JSON object")
    for name, form in table.items():
        if isinstance(form, bool) or not isinstance(form, int | str) or form not in _FORMS:
            raise CheckpointError(f"{file}: {name} has integers of {form!r} bits; 8, 4, fp8 and fp6 are read")
        if missing := {name, name + SCALE} - names:
            raise CheckpointError(f"{file} lacks {min(missing)}")
    return table


def part_names(table: Mapping[str, Form]) -> set[str]:
    """Names of scales and offsets, which are no parameters of their own."""
    return {name + part for name in table for part in (SCALE, OFFSET)}


def of_parts(name: str, tensors: Mapping[str, Tensor], form: Form, file: str) -> Integers:
    """The integers of named parts. CheckpointError naming them if they do not fit together."""
    bits, floating = _FORMS[form]
    try:
        integers = Integers(bits, tensors[name], tensors[name + SCALE], tensors.get(name + OFFSET), floating)
    except ValueError as error:
        raise CheckpointError(f"{name} in {file}: {error}") from error
    for part in (SCALE, OFFSET):
        if name + part in tensors and not tensors[name + part].isfinite().all():
            raise CheckpointError(f"{name}{part} in {file}: not all of it is finite")
    if not _are_of(integers.values, form):
        what = f"numbers are {form}" if floating else f"integers have {bits} bits"
        raise CheckpointError(f"{name} in {file}: not all of its {what}")
    return integers


def _are_of(values: Tensor, form: Form) -> bool:
    """Whether every value is one that the form has."""
    if form == 8 or not values.numel():
        return True
    if form == "fp8":
        return not bool((values & 127 == 127).any())  # NaN
    least, greatest = (-8, 7) if form == 4 else (0, 63)
    low, high = values.aminmax()
    return least <= int(low) and int(high) <= greatest


def taken(sources: Sequence[Integers], pieces: Sequence[tuple[int, int, int]], dim: int) -> Integers | None:
    """Rows (dim 0) or columns (dim 1) of integers put together, without rounding anything.

    pieces: (which source, first row or column, how many). None where they have no common form, or one with a scale for
    every few columns.
    """
    first = sources[0]
    kinds = {(source.bits, source.floating, source.offset is None) for source in sources}
    if len(kinds) > 1:
        return None
    values = torch.cat([sources[which].values.narrow(dim, start, count) for which, start, count in pieces], dim)
    if dim == 0:
        if any(source.scale.shape[1] != first.scale.shape[1] for source in sources):
            return None
        scale, offset = (
            None if part is None else torch.cat([part[which][start : start + count] for which, start, count in pieces])
            for part in _scales(sources)
        )
    else:
        stored = [source.values.shape[1] // source.scale.shape[1] for source in sources]
        group = math.gcd(*(number for which, start, count in pieces for number in (stored[which], start, count)))
        scale, offset = (
            None if part is None else torch.cat([_columns(part[piece[0]], stored, group, piece) for piece in pieces], 1)
            for part in _scales(sources)
        )
        if scale is not None and all(source.scale.shape[1] == 1 for source in sources) and _is_one(scale, offset):
            # the parts of a row that has one scale
            scale, offset = scale[:, :1], None if offset is None else offset[:, :1]
        elif group < _LEAST_GROUP:
            return None
    assert scale is not None
    offset = None if offset is None else offset.contiguous()
    return Integers(first.bits, values, scale.contiguous(), offset, first.floating)


def _scales(sources: Sequence[Integers]) -> tuple[list[Tensor], list[Tensor] | None]:
    offsets = [source.offset for source in sources if source.offset is not None]
    return [source.scale for source in sources], offsets or None


def _columns(part: Tensor, stored: Sequence[int], group: int, piece: tuple[int, int, int]) -> Tensor:
    """Scales of a piece's columns, from one for as many of them as are `stored` together to one for `group`."""
    which, start, count = piece
    return part.repeat_interleave(stored[which] // group, dim=1)[:, start // group : (start + count) // group]


def _is_one(*parts: Tensor | None) -> bool:
    return all(part is None or torch.equal(part, part[:, :1].expand_as(part)) for part in parts)
