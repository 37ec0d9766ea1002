"""What a ragged engine tracks: slots, blocks, and that a failure gives back what was taken."""

from __future__ import annotations

import pytest

from shared.engine.ragged_batch import RaggedEntries
from shared.engine.ragged_sequences import RaggedSequences
from shared.engine.scheduling_result import SchedulingError


def tracked(sequences: RaggedSequences) -> list[tuple[int, int]]:
    return [(sequence.uid, len(sequence.blocks)) for sequence in sequences]


def test_a_sequence_gets_the_blocks_that_its_tokens_need():
    sequences = RaggedSequences(9, 8, max_tracked=2)
    assert (sequences.num_total, sequences.blocks_missing(1, 17)) == (8, 3)
    one = sequences.get_or_create(1)
    sequences.extend(one, 17)
    one.seen_tokens = 17
    assert (sequences.blocks_missing(1, 7), sequences.blocks_missing(1, 8)) == (0, 1)
    assert sequences.get_or_create(1) is sequences.known(1) is one
    with pytest.raises(SchedulingError, match="KVCacheLimitExceeded"):
        sequences.extend(one, 48)
    assert (tracked(sequences), sequences.num_free) == ([(1, 3)], 5)
    assert sequences.flush(1) is one
    assert sequences.num_free == 8


def test_slots_are_so_many():
    sequences = RaggedSequences(9, 8, max_tracked=2)
    sequences.get_or_create(1)
    sequences.get_or_create(2)
    with pytest.raises(RuntimeError, match="Unable to create tracking slot for sequence 3: 2 are tracked"):
        sequences.get_or_create(3)
    sequences.flush(1)
    sequences.get_or_create(3)
    with pytest.raises(ValueError, match="uid 1: no such sequence is tracked"):
        sequences.known(1)


def test_what_fails_within_gives_back_slots_and_blocks_and_nothing_else():
    sequences = RaggedSequences(9, 8, max_tracked=3)
    before = sequences.get_or_create(1)
    sequences.extend(before, 8)
    before.seen_tokens = 8
    blocks = list(before.blocks)

    def grow_all() -> None:
        with sequences.all_or_nothing([1, 2]):
            for uid in (1, 2):
                sequence = sequences.get_or_create(uid)
                sequences.extend(sequence, 9)
                sequence.in_flight_tokens = 9
            assert tracked(sequences) == [(1, 3), (2, 2)]
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            grow_all()
        assert (tracked(sequences), before.blocks, before.in_flight_tokens) == ([(1, 1)], blocks, 0)
        assert sequences.num_free == 7


def test_entries_are_within_the_limits_of_a_batch():
    batch = RaggedEntries(max_tokens=10, max_sequences=2)
    batch.insert([5] * 6, 0, [1])
    with pytest.raises(RuntimeError, match="Ragged batch is full due to capacity limit: 10"):
        batch.insert([5] * 5, 0, [2])
    batch.insert([5] * 4, 3, [2])
    with pytest.raises(RuntimeError, match="Ragged batch is full due to sequence limit: 2"):
        batch.insert([5], 0, [3])
    assert [(len(entry.token_ids), entry.start_position) for entry in batch.entries] == [(6, 0), (4, 3)]
    assert batch.num_tokens == 10
