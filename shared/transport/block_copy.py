"""Copies blocks between two pools by address, off the event loop and without the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from threading import Event

PIECE_BYTES = 8 << 20  # between two looks at `stop`: below a millisecond


def runs(source: Sequence[int], destination: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Blocks that lie side by side in both pools, as (first source block, first destination block, count)."""
    first = 0
    for index in range(1, len(source) + 1):
        if (
            index == len(source)
            or source[index] != source[index - 1] + 1
            or destination[index] != destination[index - 1] + 1
        ):
            yield source[first], destination[first], index - first
            first = index


def copy_blocks(
    source_address: int,
    destination_address: int,
    block_bytes: int,
    source: Sequence[int],
    destination: Sequence[int],
    stop: Event,
) -> bool:
    """Copies block source[i] of one pool to block destination[i] of the other. False: `stop` was set midway.

    The addresses are of the pools' first bytes; that all blocks lie in them is the caller's to check.
    """
    for source_block, destination_block, count in runs(source, destination):
        source_begin = source_address + source_block * block_bytes
        destination_begin = destination_address + destination_block * block_bytes
        for offset in range(0, count * block_bytes, PIECE_BYTES):
            if stop.is_set():
                return False
            size = min(PIECE_BYTES, count * block_bytes - offset)
            ctypes.memmove(destination_begin + offset, source_begin + offset, size)
    return True
