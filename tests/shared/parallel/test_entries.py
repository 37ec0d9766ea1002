"""A step's entries as bytes: what comes out is what went in, and no bytes at all do harm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.batch import BatchEntry
from shared.parallel.entries import decode_entries, encode_entries

NUMBERS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
ENTRIES = st.lists(
    st.builds(BatchEntry, NUMBERS, st.integers(0, 2**31 - 1), NUMBERS, st.sampled_from(["last", "all", "none"])),
    max_size=6,
)


@settings(database=None, deadline=None)
@given(ENTRIES)
def test_entries_come_out_as_they_went_in(entries: list[BatchEntry]) -> None:
    assert decode_entries(encode_entries(entries)) == entries


def test_any_kind_of_sequence_goes_in() -> None:
    entry = BatchEntry((3, 4), 7, range(1, 4), "all")
    assert decode_entries(encode_entries([entry])) == [BatchEntry([3, 4], 7, [1, 2, 3], "all")]


@settings(database=None, deadline=None)
@given(st.binary(max_size=64))
def test_other_bytes_are_refused_or_entries(data: bytes) -> None:
    try:
        entries = decode_entries(data)
    except ValueError:
        return
    assert encode_entries(entries) == data


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([], "no entries"),
        ([2, 0, 0, 1, 1], "do not hold 2 entries"),
        ([-1], "do not hold -1 entries"),
        ([1, 3, 0, 0, 0], "wants what there is not"),
        ([1, 0, -5, 0, 0], "a negative number"),
        ([1, 0, 0, 2, 1, 7, 7], "2 numbers are not 2 tokens and 1 blocks"),
    ],
)
def test_what_is_wrong_is_said(numbers: list[int], message: str) -> None:
    data = b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)
    with pytest.raises(ValueError, match=message):
        decode_entries(data)
