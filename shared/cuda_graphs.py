"""Decode steps on a CUDA device: one graph for each batch bucket, from the tokens that go in to those that come out."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

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
    """Captures each bucket's step once and replays it: forward, penalties and draw, and the copy of the drawn tokens.

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
        self._inputs = StepInputs(max_sequences, block_tokens, table_width, pinned=on_cuda)
        self._memory = self._inputs.memory.to(self._device, copy=True)
        self._views = self._inputs.views(self._memory)
        self._tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(max_sequences, dtype=torch.int64, pin_memory=on_cuda)
        self._counts = _Counts(max_sequences, vocab_size, self._device)
        self._batches = {bucket: step_batch(self._views, bucket) for bucket in self._buckets}
        self._logits: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._replays = replays and on_cuda
        self._done = torch.cuda.Event() if on_cuda else None

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
        bucket = self._stage(entries, None)
        self._launch(bucket)
        return self._logits[bucket][: len(entries)]

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        """As GraphRunner has it."""
        bucket = self._stage(entries, rows)
        self._launch(bucket)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()  # waits for this step alone, asleep and without Python's lock
        drawn = self._drawn[: len(entries)].tolist()
        tokens = [token if self._draws(row) else None for token, row in zip(drawn, rows, strict=True)]
        return tokens, self._logits[bucket][: len(entries)]

    @staticmethod
    def _draws(row: SampleRow) -> bool:
        """Whether a step draws that row's token itself; of others the sampler edits or reports logits."""
        params = row.params
        return params.logprobs is None and not params.logit_bias and row.position >= params.min_tokens

    def _stage(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow] | None) -> int:
        """Puts a step's inputs where it reads them -> its bucket."""
        bucket = self._buckets[bisect_left(self._buckets, len(entries))]
        if self._replays and not self._graphs:
            self.capture()
        inputs = self._inputs
        for index in range(bucket):
            inputs.set(index, entries[index] if index < len(entries) else PADDING)
            row = rows[index] if rows is not None and index < len(rows) else None
            if row is None or not self._draws(row):
                inputs.set_draw(index, settings=_GREEDY)
                continue
            p = row.params
            inputs.set_draw(
                index,
                settings=(p.temperature, p.top_k, p.top_p, p.min_p),
                seed=p.seed,
                index=row.index,
                position=row.position,
                penalties=(p.repetition_penalty, p.frequency_penalty, p.presence_penalty),
                count_slot=-1 if row.history is None else self._counts.slot(row.history),
            )
        num_bytes = inputs.num_bytes(bucket)
        self._memory[:num_bytes].copy_(inputs.memory[:num_bytes], non_blocking=True)
        return bucket

    def _launch(self, bucket: int) -> None:
        if self._replays:
            self._graphs[bucket].replay()
        else:
            self._compute(bucket)
        self._launched()

    def _compute(self, bucket: int) -> None:
        """What a graph is made of."""
        views, tokens = self._views, self._tokens[:bucket]
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
        self._drawn[:bucket].copy_(tokens, non_blocking=True)


class _Counts:
    """The tokens of the sequences that have penalties, on the device, where steps count on by themselves.

    A sequence's are copied there when it comes, or comes back after steps that it was not part of.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.table = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._slots: WeakKeyDictionary[TokenHistory, int] = WeakKeyDictionary()
        self._num_counted: list[int] = [0] * num_slots

    def slot(self, history: TokenHistory) -> int:
        """Where the history's counts are. The step that this is asked for draws its next token, and counts it."""
        slot = self._slots.pop(history, None)
        if slot is None or self._num_counted[slot] != history.num_output:
            slot = self._free_slot() if slot is None else slot
            self._copy(history, slot)
        self._slots[history] = slot  # the last used is the last
        self._num_counted[slot] = history.num_output + 1
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
