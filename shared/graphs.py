"""Decode steps by batch bucket: the shape in which steps are captured once and replayed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from shared.batch import BatchEntry, RaggedBatch, build_batch

# Small batches in small steps, where a padding row costs the most; then by 16 and by 32.
_SMALL_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class GraphRunner(Protocol):
    """Runs forwards in which every sequence computes one token and wants its logits."""

    @property
    def max_sequences(self) -> int:
        """Sequences of a batch at most; a larger batch is none of this runner's."""
        ...

    def capture(self) -> None:
        """Makes every bucket ready, largest first."""
        ...

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        """float32 logits [len(entries), vocab]."""
        ...


class EagerRunner:
    """Pads to the bucket and runs the forward anew each time, as a CPU does. Padding changes no other row's bits."""

    def __init__(self, forward: Callable[[RaggedBatch], Tensor], *, max_sequences: int, block_tokens: int) -> None:
        self._forward = forward
        self._block_tokens = block_tokens
        self._buckets = make_buckets(max_sequences)

    @property
    def max_sequences(self) -> int:
        return self._buckets[-1]

    def capture(self) -> None:
        """Runs the smallest bucket, on padding alone: what loads lazily is loaded before the first request."""
        self._forward(build_batch([], self._block_tokens, pad_to=self._buckets[0]))

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        bucket = self._buckets[bisect_left(self._buckets, len(entries))]
        return self._forward(build_batch(entries, self._block_tokens, pad_to=bucket))[: len(entries)]


def make_buckets(max_sequences: int) -> list[int]:
    """Batch sizes up to exactly `max_sequences`, ascending."""
    sizes = [*_SMALL_BUCKETS, *range(80, 257, 16), *range(288, max_sequences + 32, 32)]
    return [*(size for size in sizes if size < max_sequences), max_sequences]
