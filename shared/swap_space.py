"""Host memory for the sequences that gave up their blocks."""

from __future__ import annotations

from collections.abc import Sequence

from shared.kv_cache import KvCache, KvLayout
from shared.sequence_state import SequenceState


class SwapSpace:
    """States of sequences, `limit_bytes` at most; None: as much as there is."""

    def __init__(self, caches: Sequence[KvCache], limit_bytes: int | None) -> None:
        """caches: of each rank that computes the model; a block has one number in all."""
        self._caches = tuple(caches)
        self._layout = KvLayout.joined([kv.layout for kv in caches])
        self._limit_bytes = limit_bytes
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def save(self, blocks: Sequence[int], num_tokens: int) -> SequenceState | None:
        """What the blocks of so many tokens hold, or None when there is no room for it."""
        num_bytes = -(-num_tokens // self._layout.block_tokens) * self._layout.block_bytes
        if self._limit_bytes is not None and self._used_bytes + num_bytes > self._limit_bytes:
            return None
        state = SequenceState.joined([SequenceState.take(kv, blocks, num_tokens) for kv in self._caches])
        self._used_bytes += state.num_bytes
        return state

    def restore(self, state: SequenceState, blocks: Sequence[int]) -> None:
        """Writes a state back into the first of `blocks`, and drops it."""
        for kv in self._caches:
            state.put(kv, blocks)
        self.drop(state)

    def drop(self, state: SequenceState) -> None:
        """Gives a state's room back."""
        self._used_bytes -= state.num_bytes
