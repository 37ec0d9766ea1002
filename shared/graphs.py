"""Decode steps by batch bucket: the shape in which steps are captured once and replayed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.library import Replay, record
from shared.batch import NULL_BLOCK, BatchEntry, RaggedBatch
from shared.workspace import Workspace

# Small batches in small steps, where a padding row costs the most; then by 16 and by 32.
_SMALL_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
# What fills a bucket up: it attends to itself in the block that nobody owns.
_PADDING = BatchEntry((0,), 0, (NULL_BLOCK,))


class GraphRunner(Protocol):
    """Runs forwards in which every sequence computes one token and wants its logits."""

    @property
    def max_sequences(self) -> int:
        """Sequences of a batch at most; a larger batch is none of this runner's."""
        ...

    def capture(self) -> None:
        """Makes every bucket ready, largest first; otherwise the first run does."""
        ...

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        """float32 logits [len(entries), vocab], which the next run may overwrite."""
        ...


class ReplayRunner:
    """Records each bucket's ops once and replays them by one call into C: a CUDA graph's counterpart on a CPU.

    Inputs, activations and logits lie where they lay when the bucket was recorded: they are the runner's own.
    """

    def __init__(
        self,
        forward: Callable[[RaggedBatch, Workspace], Tensor],
        *,
        max_sequences: int,
        block_tokens: int,
        table_width: int,
    ) -> None:
        """table_width: blocks of the longest sequence."""
        self._forward = forward
        self._block_tokens = block_tokens
        self._buckets = make_buckets(max_sequences)
        self._workspace = Workspace()
        self._replays: dict[int, tuple[Replay, Tensor]] = {}
        self._token_ids = np.zeros(max_sequences, dtype=np.int64)
        self._positions = np.zeros(max_sequences, dtype=np.int32)
        self._slots = np.zeros(max_sequences, dtype=np.int64)
        self._context_lens = np.ones(max_sequences, dtype=np.int32)
        self._block_tables = np.full((max_sequences, table_width), NULL_BLOCK, dtype=np.int32)
        self._cu_seqlens = np.arange(max_sequences + 1, dtype=np.int32)
        self._logit_rows = np.arange(max_sequences)

    @property
    def max_sequences(self) -> int:
        return self._buckets[-1]

    def capture(self) -> None:
        # largest first: the workspace grows to its size, and no later bucket moves it
        for bucket in reversed(self._buckets):
            batch = self._batch(bucket)
            with record() as replay:
                logits = self._forward(batch, self._workspace)
            self._replays[bucket] = replay, logits

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        if not self._replays:
            self.capture()
        bucket = self._buckets[bisect_left(self._buckets, len(entries))]
        for row, entry in enumerate(entries):
            self._set(row, entry)
        for row in range(len(entries), bucket):
            self._set(row, _PADDING)
        replay, logits = self._replays[bucket]
        replay()
        return logits if len(entries) == bucket else logits[: len(entries)]

    def _set(self, row: int, entry: BatchEntry) -> None:
        position, blocks = entry.start_position, entry.block_table
        if len(entry.token_ids) != 1 or not 0 <= position < len(blocks) * self._block_tokens:
            raise ValueError(
                f"entry {row}: {len(entry.token_ids)} tokens from position {position} in {len(blocks)} blocks of "
                f"{self._block_tokens}; a step computes one token of each sequence"
            )
        self._token_ids[row] = entry.token_ids[0]
        self._positions[row] = position
        self._context_lens[row] = position + 1
        self._slots[row] = blocks[position // self._block_tokens] * self._block_tokens + position % self._block_tokens
        self._block_tables[row, : len(blocks)] = blocks

    def _batch(self, bucket: int) -> RaggedBatch:
        """The runner's inputs, of the first rows; the arrays' own memory."""
        return RaggedBatch(
            token_ids=torch.from_numpy(self._token_ids[:bucket]),
            positions=torch.from_numpy(self._positions[:bucket]),
            cu_seqlens=torch.from_numpy(self._cu_seqlens[: bucket + 1]),
            context_lens=torch.from_numpy(self._context_lens[:bucket]),
            block_tables=torch.from_numpy(self._block_tables[:bucket]),
            slots=torch.from_numpy(self._slots[:bucket]),
            logit_rows=torch.from_numpy(self._logit_rows[:bucket]),
        )


def make_buckets(max_sequences: int) -> list[int]:
    """Batch sizes up to exactly `max_sequences`, ascending."""
    sizes = [*_SMALL_BUCKETS, *range(80, 257, 16), *range(288, max_sequences + 32, 32)]
    return [*(size for size in sizes if size < max_sequences), max_sequences]
