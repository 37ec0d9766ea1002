"""How the C linears read a weight: panels of 32 outputs side by side, feature by feature, or by pairs of features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantization import WORD

_WIDTH = 32  # output features side by side
# The outputs of an int8 panel of pairs, which unpacking bytes brings back in order.
_UNPACKED = [4 * lane + 16 * half + i for lane in range(4) for half in range(2) for i in range(4)]


def pack(values: Tensor, bits: int | None, *, pairs: bool) -> Tensor:
    """[out, in] floats, or integers of so many bits -> as its op reads it."""
    if bits == 4:
        return pack_scales(_words(values, _shifts(pairs)))
    if not pairs:
        return pack_scales(values)
    panels = pack_scales(functional.pad(values, (0, values.shape[1] % 2)))
    by_pair = panels.unflatten(1, (-1, 2)).transpose(2, 3)  # [panels, pairs, 32, 2]
    return (by_pair if bits is None else by_pair[:, :, _UNPACKED]).contiguous()


def unpack(panels: Tensor, shape: tuple[int, int], bits: int, *, pairs: bool) -> Tensor:
    """The integers [out, in] that `pack` was given."""
    outputs, inputs = shape
    if bits == 4:
        words = unpack_scales(panels, outputs)
        return ((words[:, :, None] >> _shifts(pairs) & 15) - 8).flatten(1)[:, :inputs]
    if pairs:
        by_pair = torch.empty_like(panels)
        by_pair[:, :, _UNPACKED] = panels
        panels = by_pair.transpose(2, 3).flatten(1, 2)
    return unpack_scales(panels, outputs)[:, :inputs]


def unpack_plain(panels: Tensor, shape: tuple[int, int], *, pairs: bool) -> Tensor:
    """The floats [out, in] that `pack` was given."""
    outputs, inputs = shape
    by_feature = panels.transpose(2, 3).flatten(1, 2) if pairs else panels
    return unpack_scales(by_feature, outputs)[:, :inputs].contiguous()


def pack_scales(weight: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / 32), in, 32], filled up with zeros."""
    outputs, inputs = weight.shape
    panels = torch.zeros(-(-outputs // _WIDTH) * _WIDTH, inputs, dtype=weight.dtype)
    panels[:outputs] = weight
    return panels.view(-1, _WIDTH, inputs).transpose(1, 2).contiguous()


def unpack_scales(panels: Tensor, outputs: int) -> Tensor:
    """[ceil(out / 32), in, 32] -> [out, in]."""
    return panels.transpose(1, 2).flatten(0, 1)[:outputs]


def _words(integers: Tensor, shifts: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 8)], 4 bits of each + 8 where `shifts` says."""
    padded = functional.pad(integers, (0, -integers.shape[1] % WORD)).add(8).to(torch.int32)
    return (padded.unflatten(1, (-1, WORD)) << shifts).sum(2, dtype=torch.int32)


def _shifts(pairs: bool) -> Tensor:
    """Where an int4 word has each of its input features: in order, or the second of a pair in the upper half."""
    shifts = [4 * (i // 2) + 16 * (i % 2) if pairs else 4 * i for i in range(WORD)]
    return torch.tensor(shifts, dtype=torch.int32)
