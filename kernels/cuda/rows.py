"""How the Triton linears read a weight: row by row, in parts of so many input features that lie side by side.

A row of `part` features, zeros beyond the last, is

    plain        floats
    int8, fp8    a byte for each feature
    int4         part bytes: byte i has feature i in its lower and feature part + i in its upper half, each plus 8
    fp6          2 * part bytes of four upper bits: byte q * part + i has those of feature q * part + i in its lower
                 half and of feature (q + 2) * part + i in its upper half; then part bytes of two lower bits, byte i
                 with those of feature q * part + i at bit 2 * q

so that a tile of bytes is a tile of features of each part, and none has to change places.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PARTS = {"plain": 1, "int8": 1, "fp8": 1, "int4": 2, "fp6": 4}
_ALIGNED = 16  # bytes of a wide load


def part_features(form: str, in_features: int) -> int:
    """Input features of a part."""
    parts = PARTS[form]
    return in_features if parts == 1 else -(-in_features // (parts * _ALIGNED)) * _ALIGNED


def pack(values: Tensor, form: str) -> Tensor:
    """[out, in] floats, integers, or bits of floats -> rows."""
    if PARTS[form] == 1:
        return values.contiguous()
    part = part_features(form, values.shape[1])
    bits = functional.pad(
        values.to(torch.int16) + (8 if form == "int4" else 0), (0, PARTS[form] * part - values.shape[1])
    )
    q = bits.unflatten(1, (-1, part)).unbind(1)
    if form == "int4":
        return (q[0] | q[1] << 4).to(torch.uint8)
    upper = [q[0] >> 2 | q[2] >> 2 << 4, q[1] >> 2 | q[3] >> 2 << 4]
    lower = q[0] & 3 | (q[1] & 3) << 2 | (q[2] & 3) << 4 | (q[3] & 3) << 6
    return torch.cat([*upper, lower], 1).to(torch.uint8)


def unpack(rows: Tensor, form: str, in_features: int) -> Tensor:
    """int8 [out, in]: the integers, or bits of floats, that `pack` was given."""
    if PARTS[form] == 1:
        return rows
    part, rows = part_features(form, in_features), rows.to(torch.int16)
    if form == "int4":
        return torch.cat([(rows & 15) - 8, (rows >> 4) - 8], 1)[:, :in_features].to(torch.int8)
    first, second, lower = rows.split(part, 1)
    upper = (first & 15, second & 15, first >> 4, second >> 4)
    return torch.cat([u << 2 | lower >> 2 * q & 3 for q, u in enumerate(upper)], 1)[:, :in_features].to(torch.int8)
