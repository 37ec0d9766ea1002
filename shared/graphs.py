"""Decode steps by batch bucket: the shape in which steps are captured once and replayed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from kernels.cpu.library import Replay, record
from shared.batch import BatchEntry, RaggedBatch, build_batch
from shared.penalties import SampleRow
from shared.step_inputs import PADDING, StepInputs, step_batch
from shared.workspace import Workspace

# Small batches in small steps, where a padding row costs the most; then by 16 and by 32.
_SMALL_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


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

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        """(tokens, logits): the row's token where this runner draws it, -1 if its logits define no distribution; None
        where that is left to the sampler, and the logits are the model's own. rows: one for each entry."""
        ...


# Begins a step of entries and rows that draws all its tokens; the result waits for them, and is called before the next
# step but one is begun. The third argument: of each entry the row of the step begun before whose token it starts with,
# -1 = its own. None: one of the rows is left to the sampler, and nothing was begun.
Launch = Callable[[Sequence[BatchEntry], Sequence[SampleRow], Sequence[int]], Callable[[], list[int]] | None]


class EagerRunner:
    """Runs op by op: what ranks exchange between two ops is none that a replay would repeat."""

    def __init__(self, forward: Callable[[RaggedBatch], Tensor], *, max_sequences: int, block_tokens: int) -> None:
        self._forward, self._block_tokens = forward, block_tokens
        self.max_sequences = max_sequences

    def capture(self) -> None:
        """There is nothing to make ready."""

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        return self._forward(build_batch(entries, self._block_tokens))

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        return [None] * len(rows), self.run(entries)


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
        self._buckets = make_buckets(max_sequences)
        self._workspace = Workspace()
        self._replays: dict[int, tuple[Replay, Tensor, RaggedBatch]] = {}
        self._inputs = StepInputs(max_sequences, block_tokens, table_width)
        self._views = self._inputs.views(self._inputs.memory)

    @property
    def max_sequences(self) -> int:
        return self._buckets[-1]

    def capture(self) -> None:
        # largest first: the workspace grows to its size, and no later bucket moves it
        for bucket in reversed(self._buckets):
            batch = step_batch(self._views, bucket)
            with record() as replay:
                logits = self._forward(batch, self._workspace)
            self._replays[bucket] = replay, logits, batch

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        if not self._replays:
            self.capture()
        bucket = self._buckets[bisect_left(self._buckets, len(entries))]
        for row, entry in enumerate(entries):
            self._inputs.set(row, entry)
        for row in range(len(entries), bucket):
            self._inputs.set(row, PADDING)
        replay, logits, _ = self._replays[bucket]
        replay()
        return logits if len(entries) == bucket else logits[: len(entries)]

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        return [None] * len(rows), self.run(entries)


def make_buckets(max_sequences: int) -> list[int]:
    """Batch sizes up to exactly `max_sequences`, ascending."""
    sizes = [*_SMALL_BUCKETS, *range(80, 257, 16), *range(288, max_sequences + 32, 32)]
    return [*(size for size in sizes if size < max_sequences), max_sequences]
