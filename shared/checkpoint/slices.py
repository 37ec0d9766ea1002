"""Slices of a checkpoint's parameters. A checkpoint that is `Sliced` reads no more than them; of others the rest is
read and dropped, or, where its file is mapped, never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint


@runtime_checkable
class Sliced(Protocol):
    """What a checkpoint does besides, that can read a part of a parameter."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """tensor(name) from `start` to `stop` of a dimension."""
        ...

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        """Of integers(name)."""
        ...


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """KeyError for a wrong name, as of the functions below."""
    return checkpoint.shape(name) if isinstance(checkpoint, Sliced) else tuple(checkpoint.tensor(name).shape)


def part_of(checkpoint: Checkpoint, name: str, dim: int, ranges: Sequence[range]) -> Tensor:
    """Ranges of a dimension, put together in order."""
    if isinstance(checkpoint, Sliced):
        parts = [checkpoint.part(name, dim, one.start, one.stop) for one in ranges]
    else:
        whole = checkpoint.tensor(name)
        parts = [whole.narrow(dim, one.start, len(one)) for one in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def integer_rows_of(checkpoint: Checkpoint, name: str, ranges: Sequence[range]) -> Integers | None:
    """Rows of what is stored as integers, put together in order; None where it is not."""
    if isinstance(checkpoint, Sliced):
        parts = [checkpoint.integer_rows(name, one.start, one.stop) for one in ranges]
    else:
        whole = checkpoint.integers(name)
        parts = [None if whole is None else rows_of(whole, one.start, one.stop) for one in ranges]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return found[0] if len(found) == 1 else joined_rows(found)


def rows_of(integers: Integers, start: int, stop: int) -> Integers:
    """Some rows, over the same memory."""
    rows = slice(start, stop)
    offset = None if integers.offset is None else integers.offset[rows]
    return replace(integers, values=integers.values[rows], scale=integers.scale[rows], offset=offset)


def joined_rows(parts: Sequence[Integers]) -> Integers:
    """One behind the other, of integers that were made alike."""
    offsets = [part.offset for part in parts if part.offset is not None]
    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        offset=torch.cat(offsets) if offsets else None,
    )


def shared_out(ranges: Sequence[range], lengths: Sequence[int]) -> Iterator[tuple[int, list[range]]]:
    """Ranges of parameters that lie one behind the other -> (which, its own ranges), of those that have a part in it.

    The order of what is read by them is that of the ranges, where these go from one parameter to the next.
    """
    start = 0
    for which, length in enumerate(lengths):
        own = [range(max(one.start - start, 0), min(one.stop - start, length)) for one in ranges]
        own = [one for one in own if one]
        if own:
            yield which, own
        start += length
