import ctypes
import os
from threading import Event

import pytest

from shared.transport.block_copy import copy_blocks, runs


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ([], [], []),
        ([5], [2], [(5, 2, 1)]),
        ([1, 2, 3], [7, 8, 9], [(1, 7, 3)]),
        ([1, 2, 3], [7, 8, 10], [(1, 7, 2), (3, 10, 1)]),
        ([1, 3, 4], [7, 8, 9], [(1, 7, 1), (3, 8, 2)]),
        ([3, 2, 1], [9, 8, 7], [(3, 9, 1), (2, 8, 1), (1, 7, 1)]),
    ],
)
def test_finds_what_lies_side_by_side_in_both(source, destination, expected):
    assert list(runs(source, destination)) == expected


@pytest.mark.parametrize("block_bytes", [1, 48, 3 << 20], ids=["a byte", "small", "runs longer than a piece"])
def test_copies_these_blocks_and_no_other_byte(block_bytes):
    num_blocks = 12
    source = ctypes.create_string_buffer(os.urandom(num_blocks * block_bytes), num_blocks * block_bytes)
    before = os.urandom(num_blocks * block_bytes)
    destination = ctypes.create_string_buffer(before, len(before))
    sources = [1, 2, 3, 4, 9, 10, 6]
    destinations = [3, 4, 5, 6, 7, 9, 1]
    addresses = ctypes.addressof(source), ctypes.addressof(destination)
    assert copy_blocks(*addresses, block_bytes, sources, destinations, Event())
    expected = bytearray(before)
    for s, d in zip(sources, destinations, strict=True):
        expected[d * block_bytes : (d + 1) * block_bytes] = source.raw[s * block_bytes : (s + 1) * block_bytes]
    assert destination.raw == expected


def test_writes_nothing_once_stopped():
    source, destination = ctypes.create_string_buffer(b"a" * 64, 64), ctypes.create_string_buffer(64)
    stop = Event()
    stop.set()
    assert not copy_blocks(ctypes.addressof(source), ctypes.addressof(destination), 16, [1, 2], [1, 2], stop)
    assert destination.raw == bytes(64)
