"""How the C linears read a weight: panels of 32 outputs side by side, feature by feature, or by pairs of features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WIDTH = 32  # output features side by side
_WORDS = {"fp6": 16}  # input features of a word, of which a group has a whole number, where they are not 8
# The outputs of a panel of pairs of bytes, which unpacking bytes brings back in order.
_UNPACKED = [4 * lane + 16 * half + i for lane in range(4) for half in range(2) for i in range(4)]


def pack(values: Tensor, form: str, *, group: int, pairs: bool) -> Tensor:
    """[out, in] floats, integers, or bits of floats, in groups of so many -> as its op reads it."""
    values = _fill(values, form, group)
    if form == "int4":
        return pack_scales(_words(values, _shifts(pairs)))
    if form == "fp6":
        return pack_scales(_six_bits(values)).unflatten(1, (-1, 3))
    if not pairs:
        return pack_scales(values)
    panels = pack_scales(functional.pad(values, (0, values.shape[1] % 2)))
    by_pair = panels.unflatten(1, (-1, 2)).transpose(2, 3)  # [panels, pairs, 32, 2]
    return (by_pair if form == "plain" else by_pair[:, :, _UNPACKED]).contiguous()


def unpack(panels: Tensor, shape: tuple[int, int], form: str, *, group: int, pairs: bool) -> Tensor:
    """The integers or bits, int8 [out, in], that `pack` was given."""
    outputs, inputs = shape
    if form == "int4":
        words = unpack_scales(panels, outputs)
        values = ((words[:, :, None] >> _shifts(pairs) & 15) - 8).flatten(1)
    elif form == "fp6":
        values = _numbers(unpack_scales(panels.flatten(1, 2), outputs))
    else:
        if pairs:
            by_pair = torch.empty_like(panels)
            by_pair[:, :, _UNPACKED] = panels
            panels = by_pair.transpose(2, 3).flatten(1, 2)
        values = unpack_scales(panels, outputs)
    groups = inputs // group
    filled = values.shape[1] // groups if groups > 1 else values.shape[1]
    return values[:, : groups * filled].unflatten(1, (groups, filled))[:, :, :group].flatten(1).to(torch.int8)


def unpack_plain(panels: Tensor, shape: tuple[int, int], *, pairs: bool) -> Tensor:
    """The floats [out, in] that `pack` was given."""
    outputs, inputs = shape
    by_feature = panels.transpose(2, 3).flatten(1, 2) if pairs else panels
    return unpack_scales(by_feature, outputs)[:, :inputs].contiguous()


def pack_fours(integers: Tensor) -> Tensor:
    """int8 [out, in] -> uint8 [ceil(out / 32), 2 * ceil(in / 8), 32, 4], each + 128."""
    biased = functional.pad(integers, (0, -integers.shape[1] % 8)).to(torch.int16).add(128).to(torch.uint8)
    return pack_scales(biased).unflatten(1, (-1, 4)).transpose(2, 3).contiguous()


def unpack_fours(panels: Tensor, shape: tuple[int, int]) -> Tensor:
    """The int8 [out, in] that `pack_fours` was given."""
    outputs, inputs = shape
    biased = unpack_scales(panels.transpose(2, 3).flatten(1, 2), outputs)[:, :inputs]
    return (biased.to(torch.int16) - 128).to(torch.int8)


def pack_scales(weight: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / 32), in, 32], filled up with zeros."""
    outputs, inputs = weight.shape
    panels = torch.zeros(-(-outputs // _WIDTH) * _WIDTH, inputs, dtype=weight.dtype)
    panels[:outputs] = weight
    return panels.view(-1, _WIDTH, inputs).transpose(1, 2).contiguous()


def unpack_scales(panels: Tensor, outputs: int) -> Tensor:
    """[ceil(out / 32), in, 32] -> [out, in]."""
    return panels.transpose(1, 2).flatten(0, 1)[:outputs]


def _fill(values: Tensor, form: str, group: int) -> Tensor:
    """Each of several groups filled up to whole words."""
    missing = -group % _WORDS.get(form, 8)
    if group == values.shape[1] or not missing:
        return values
    return functional.pad(values.unflatten(1, (-1, group)), (0, missing)).flatten(1)


def _words(integers: Tensor, shifts: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 8)], 4 bits of each + 8 where `shifts` says."""
    padded = functional.pad(integers, (0, -integers.shape[1] % len(shifts))).add(8).to(torch.int32)
    return (padded.unflatten(1, (-1, len(shifts))) << shifts).sum(2, dtype=torch.int32)


def _shifts(pairs: bool) -> Tensor:
    """Where an int4 word has each of its input features: in order, or the second of a pair in the upper half."""
    shifts = [4 * (i // 2) + 16 * (i % 2) if pairs else 4 * i for i in range(8)]
    return torch.tensor(shifts, dtype=torch.int32)


def _six_bits(bits: Tensor) -> Tensor:
    """Of e3m2, int8 [out, in] -> int32 [out, 3 * ceil(in / 16)] as kernels/cpu/linear.c says."""
    padded = functional.pad(bits, (0, -bits.shape[1] % 16)).to(torch.int32).unflatten(1, (-1, 8, 2))
    n = (padded[..., 0] | padded[..., 1] << 16).unbind(2)
    low, high = 0xF000F, 0x30003  # bits of both halves
    first = n[0] | n[1] << 6 | (n[2] & low) << 12
    second = n[3] | n[4] << 6 | (n[5] & low) << 12
    third = n[6] | n[7] << 6 | (n[2] >> 4 & high) << 12 | (n[5] >> 4 & high) << 14
    return torch.stack([first, second, third], 2).flatten(1)


def _numbers(words: Tensor) -> Tensor:
    """The bits of e3m2 [out, in] of `_six_bits`."""
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 2).unflatten(1, (-1, 3))  # [out, words, 3, 2]
    first, second, third = halves.unbind(2)
    n2, n5 = first >> 12 | (third >> 8 & 48), second >> 12 | (third >> 10 & 48)
    numbers = (first, first >> 6, n2, second, second >> 6, n5, third, third >> 6)
    return (torch.stack(numbers, 2) & 63).flatten(1)
