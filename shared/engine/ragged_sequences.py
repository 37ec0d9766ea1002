"""The sequences that a ragged engine tracks: which blocks each holds, and how many of its tokens are in them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared.block_allocator import BlockAllocator, OutOfBlocks
from shared.engine.scheduling_result import SchedulingError, SchedulingResult
from shared.sequence_state import SequenceState

log = logging.getLogger(__name__)


@dataclass(eq=False)
class TrackedSequence:
    """seen_tokens: in the cache. in_flight_tokens: that the forward which runs now brings into it.

    saved: what its blocks held, once it has given them up.
    """

    uid: int
    blocks: list[int] = field(default_factory=list)
    seen_tokens: int = 0
    in_flight_tokens: int = 0
    saved: SequenceState | None = None

    @property
    def is_offloaded(self) -> bool:
        return self.saved is not None


class RaggedSequences:
    """By uid. max_tracked: at once, offloaded ones too. Not thread-safe; it has one owner."""

    def __init__(self, num_blocks: int, block_tokens: int, *, max_tracked: int) -> None:
        """num_blocks: of the pool, the null block included."""
        self._allocator = BlockAllocator(num_blocks)
        self._block_tokens, self._max_tracked = block_tokens, max_tracked
        self._tracked: dict[int, TrackedSequence] = {}

    def __iter__(self) -> Iterator[TrackedSequence]:
        """The longest tracked first."""
        return iter(tuple(self._tracked.values()))

    def __len__(self) -> int:
        return len(self._tracked)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._allocator.num_free

    @property
    def num_total(self) -> int:
        """Blocks that sequences can hold between them."""
        return self._allocator.num_total

    def get(self, uid: int) -> TrackedSequence | None:
        return self._tracked.get(uid)

    def known(self, uid: int) -> TrackedSequence:
        """Raises ValueError for one that is not tracked."""
        sequence = self._tracked.get(uid)
        if sequence is None:
            raise ValueError(f"uid {uid}: no such sequence is tracked")
        return sequence

    def blocks_missing(self, uid: int, num_tokens: int) -> int:
        """Blocks that the next `num_tokens` tokens of a sequence, or of a fresh one, need beside those that it has."""
        sequence = self._tracked.get(uid)
        seen, held = (0, 0) if sequence is None else (sequence.seen_tokens, len(sequence.blocks))
        return max(-(-(seen + num_tokens) // self._block_tokens) - held, 0)

    @contextmanager
    def all_or_nothing(self, uids: Collection[int]) -> Iterator[None]:
        """If what is done within fails, these sequences are tracked, and hold blocks, as they did before."""
        before = {uid: len(self._tracked[uid].blocks) for uid in uids if uid in self._tracked}
        try:
            yield
        except BaseException:
            for sequence in [self._tracked[uid] for uid in reversed([*uids]) if uid in self._tracked]:
                kept = before.get(sequence.uid, 0)
                self._allocator.free(sequence.blocks[kept:])
                del sequence.blocks[kept:]
                sequence.in_flight_tokens = 0
                if sequence.uid not in before:
                    del self._tracked[sequence.uid]
            raise

    def get_or_create(self, uid: int) -> TrackedSequence:
        """Raises RuntimeError where as many are tracked as may be."""
        sequence = self._tracked.get(uid)
        if sequence is None:
            if len(self._tracked) >= self._max_tracked:
                raise RuntimeError(
                    f"Unable to create tracking slot for sequence {uid}: {self._max_tracked} are tracked "
                    "(max_tracked_sequences); flush one"
                )
            sequence = self._tracked[uid] = TrackedSequence(uid)
        return sequence

    def extend(self, sequence: TrackedSequence, num_tokens: int) -> None:
        """Gives it blocks for its next tokens. Raises SchedulingError where they cannot be had."""
        sequence.blocks += self.allocate(self.blocks_missing(sequence.uid, num_tokens))

    def allocate(self, num_blocks: int) -> list[int]:
        """Raises SchedulingError."""
        try:
            return self._allocator.allocate(num_blocks)
        except OutOfBlocks as error:
            raise SchedulingError(SchedulingResult.KVCacheLimitExceeded) from error

    def release_blocks(self, sequence: TrackedSequence) -> None:
        """It stays tracked."""
        self._allocator.free(sequence.blocks)
        sequence.blocks = []

    def flush(self, uid: int) -> TrackedSequence | None:
        """Forgets a sequence and frees what it holds; one that is not tracked only has a warning logged."""
        sequence = self._tracked.pop(uid, None)
        if sequence is None:
            log.warning("Attempting to flush sequence %s which does not exist.", uid)
            return None
        self.release_blocks(sequence)
        return sequence
