"""Decode steps on a CUDA device: one graph for each batch bucket, from the tokens that go in to those that come out."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.feed import feed
from kernels.penalties import IN_PROMPT, count_tokens, edit_tokens
from kernels.sampling import How, draw_tokens
from shared.batch import BatchEntry, RaggedBatch
from shared.graphs import make_buckets
from shared.penalties import SampleRow, TokenHistory
from shared.step_inputs import PADDING, StepInputs, step_batch
from shared.workspace import Workspace

log = logging.getLogger(__name__)

_WARM_UPS = 3  # that what is made on first use is made before a capture
_GREEDY = How(0.0)


class CudaRunner:
    """Captures each bucket's step once and replays it: forward, penalties and draw.

    What a graph reads and writes is the runner's own: a step's inputs reach the device in one copy, and only its tokens
    come back. Without `replays` every step is launched op by op, to the same bits: for a look at one op, and for
    Triton's interpreter, which has no graphs.
    """

    def __init__(
        self,
        forward: Callable[[RaggedBatch, Workspace], Tensor],
        *,
        device: torch.device | str,
        max_sequences: int,
        block_tokens: int,
        table_width: int,
        vocab_size: int,
        replays: bool,
        launched: Callable[[], None],
    ) -> None:
        """table_width: blocks of the longest sequence. launched: called when the device has begun a step."""
        self._forward, self._launched = forward, launched
        self._device = torch.device(device)
        self._buckets = make_buckets(max_sequences)
        self._workspace = Workspace(device)
        on_cuda = self._device.type == "cuda"
        # two of each on the host: one step's may be read while the next one's are written
        self._inputs = [StepInputs(max_sequences, block_tokens, table_width, pinned=on_cuda) for _ in range(2)]
        self._drawn = [torch.zeros(max_sequences, dtype=torch.int64, pin_memory=on_cuda) for _ in range(2)]
        self._done = [torch.cuda.Event() for _ in range(2)] if on_cuda else None
        self._turn = 0
        self._memory = self._inputs[0].memory.to(self._device, copy=True)
        self._views = self._inputs[0].views(self._memory)
        self._token_ids = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        # so many that those of the step before are never those that are used least
        self._counts = _Counts(2 * max_sequences, vocab_size, self._device)
        self._batches = {
            bucket: replace(step_batch(self._views, bucket), token_ids=self._token_ids[:bucket])
            for bucket in self._buckets
        }
        self._logits: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._replays = replays and on_cuda

    @property
    def max_sequences(self) -> int:
        return self._buckets[-1]

    def capture(self) -> None:
        """Makes every bucket ready, and logs what that took."""
        if not self._replays:
            self._compute(self._buckets[-1])
            return
        begun_s, free_bytes = time.monotonic(), torch.cuda.mem_get_info(self._device)[0]
        pool = torch.cuda.graph_pool_handle()
        # largest first: the workspace and the pool grow to its size, and no later bucket moves or enlarges them
        for bucket in reversed(self._buckets):
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._compute(bucket)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._compute(bucket)
            self._graphs[bucket] = graph
        used_bytes = free_bytes - torch.cuda.mem_get_info(self._device)[0]
        log.info(
            "captured %d decode steps of up to %d sequences in %.1f s; they take %d MiB",
            len(self._graphs),
            self.max_sequences,
            time.monotonic() - begun_s,
            used_bytes >> 20,
        )

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        """float32 logits [len(entries), vocab], which the next run may overwrite. Draws nothing."""
        bucket = self._begin(entries, None, None)
        self._wait(self._turn, 0)  # or the next but one would write over inputs that are still to be read
        return self._logits[bucket][: len(entries)]

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        """As GraphRunner has it."""
        bucket = self._begin(entries, rows, None)
        drawn = self._wait(self._turn, len(entries))
        tokens = [token if _draws(row) else None for token, row in zip(drawn, rows, strict=True)]
        return tokens, self._logits[bucket][: len(entries)]

    def launch(
        self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow], sources: Sequence[int]
    ) -> Callable[[], list[int]] | None:
        """shared.graphs.Launch."""
        if len(entries) > self.max_sequences or not all(map(_draws, rows)):
            return None
        self._begin(entries, rows, sources)
        return partial(self._wait, self._turn, len(entries))

    def _begin(
        self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow] | None, sources: Sequence[int] | None
    ) -> int:
        """Puts a step's inputs where it reads them, and has the device begin it -> its bucket."""
        if self._replays and not self._graphs:
            self.capture()
        bucket = self._buckets[bisect_left(self._buckets, len(entries))]
        self._turn = 1 - self._turn
        inputs = self._inputs[self._turn]
        for index, entry in enumerate(entries):
            inputs.set(index, entry, -1 if sources is None else sources[index])
            self._set_draw(inputs, index, None if rows is None else rows[index])
        for index in range(len(entries), bucket):
            inputs.set(index, PADDING)
            self._set_draw(inputs, index, None)
        num_bytes = inputs.num_bytes(bucket)
        self._memory[:num_bytes].copy_(inputs.memory[:num_bytes], non_blocking=True)
        if self._replays:
            self._graphs[bucket].replay()
        else:
            self._compute(bucket)
        if rows is not None:
            self._drawn[self._turn][:bucket].copy_(self._tokens[:bucket], non_blocking=True)
        if self._done is not None:
            self._done[self._turn].record()
        self._launched()
        return bucket

    def _wait(self, turn: int, num_rows: int) -> list[int]:
        """The tokens of the step begun in that turn, once they are there."""
        if self._done is not None:
            self._done[turn].synchronize()  # for that step alone, without Python's lock
        return self._drawn[turn][:num_rows].tolist()

    def _set_draw(self, inputs: StepInputs, index: int, row: SampleRow | None) -> None:
        if row is None or not _draws(row):
            inputs.set_draw(index, settings=_GREEDY)
            return
        p = row.params
        inputs.set_draw(
            index,
            settings=(p.temperature, p.top_k, p.top_p, p.min_p),
            seed=p.seed,
            index=row.index,
            position=row.position,
            penalties=(p.repetition_penalty, p.frequency_penalty, p.presence_penalty),
            count_slot=-1 if row.history is None else self._counts.slot(row.history, row.position),
        )

    def _compute(self, bucket: int) -> None:
        """What a graph is made of."""
        views, tokens = self._views, self._tokens[:bucket]
        feed(views["token_ids"][:bucket], views["sources"][:bucket], self._tokens, out=self._token_ids[:bucket])
        logits = self._logits[bucket] = self._forward(self._batches[bucket], self._workspace)
        edit_tokens(logits, views["count_slots"][:bucket], self._counts.table, views["penalties"][:bucket])
        draw_tokens(
            logits,
            views["draw_settings"][:bucket],
            views["seeds"][:bucket],
            views["output_indices"][:bucket],
            views["output_positions"][:bucket],
            tokens,
        )
        count_tokens(self._counts.table, views["count_slots"][:bucket], tokens)


def _draws(row: SampleRow) -> bool:
    """Whether a step draws that row's token itself; of others the sampler edits or reports logits."""
    params = row.params
    return params.logprobs is None and not params.logit_bias and row.position >= params.min_tokens


class _Counts:
    """The tokens of the sequences that have penalties, on the device, where steps count on by themselves.

    A sequence's are copied there when it comes, or comes back after steps that it was not part of.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.table = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._slots: WeakKeyDictionary[TokenHistory, int] = WeakKeyDictionary()
        self._num_counted: list[int] = [0] * num_slots

    def slot(self, history: TokenHistory, position: int) -> int:
        """Where the counts of so many generated tokens are. The step that asks draws the next, and counts it."""
        slot = self._slots.pop(history, None)
        if slot is None or self._num_counted[slot] != position:
            if history.num_output != position:
                raise RuntimeError(f"{position} generated tokens are not counted, and {history.num_output} are known")
            slot = self._free_slot() if slot is None else slot
            self._copy(history, slot)
        self._slots[history] = slot  # the last used is the last
        self._num_counted[slot] = position + 1
        return slot

    def _free_slot(self) -> int:
        """One that nobody has, else that of the sequence which has not been part of a step for longest."""
        taken = set(self._slots.values())
        if len(taken) == len(self.table):
            return self._slots.pop(next(iter(self._slots)))
        return next(slot for slot in range(len(self.table)) if slot not in taken)

    def _copy(self, history: TokenHistory, slot: int) -> None:
        token_ids, counts = history.counts()
        known = token_ids < self.table.shape[1]
        row = self.table[slot].zero_()
        ids = torch.from_numpy(token_ids[known]).to(row.device)
        row[ids] = (torch.from_numpy(counts[known]).int() | IN_PROMPT).to(row.device)
