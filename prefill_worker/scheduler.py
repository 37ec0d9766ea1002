"""Continuous chunked prefill: which prompts hold blocks, and what each step computes. Runs on the engine thread.

A prompt waits, by priority and then arrival, until the blocks of all its tokens can be had, so that no two prompts can
block each other half done. Those that hold blocks share each step fairly between long and short ones, by the policy of
shared/token_budget.py. A computed prompt keeps its blocks until it is released, which is when its stream ends: decode
workers read them.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from typing import Any

from prefill_worker.prompt import Computed, Done, Event, Failed, Prompt
from shared.block_pool import BlockPool, OutOfBlocks
from shared.cores import Cores
from shared.engine import Engine
from shared.engine_thread import Load
from shared.parallel.group import GroupError
from shared.rpc import RpcError, exhausted, internal
from shared.step import Outcome, Part, run_step
from shared.token_budget import Demand, share_budget

RETRY_AFTER_S = 0.5


class PrefillScheduler:
    """chunk_tokens, batch_tokens: of one prompt and of all in a step, at most. max_running: prompts holding blocks.

    cores: shared with other workers; default: with nobody.
    """

    pause_s = 0.0  # between steps

    def __init__(
        self,
        engine: Engine,
        pool: BlockPool,
        *,
        chunk_tokens: int,
        batch_tokens: int,
        max_running: int,
        max_waiting: int,
        cores: Cores | None = None,
    ) -> None:
        self._engine = engine
        self._cores = cores or Cores()
        self._pool = pool
        self._chunk_tokens = chunk_tokens
        self._batch_tokens = batch_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: list[Prompt] = []  # by queue_key
        self._holding: dict[Prompt, None] = {}  # has blocks; in the order of admission
        self._arrivals = 0
        self._steps = 0
        self._events: list[tuple[Callable[[Any], None], Any]] = []

    def prepare(self) -> None:
        self._engine.use_thread()

    def submit(self, prompt: Prompt) -> None:
        """Takes a prompt in, or tells it RESOURCE_EXHAUSTED."""
        self._arrivals += 1
        prompt.arrival = self._arrivals
        insort(self._waiting, prompt, key=lambda p: p.queue_key)
        self._admit()
        if prompt not in self._holding and len(self._waiting) > self._max_waiting:
            # the last in line goes, which a prompt of a higher priority need not be
            refused = self._waiting.pop()
            self._emit(refused, Failed(exhausted(f"{len(self._waiting)} prompts wait for blocks", RETRY_AFTER_S)))

    def release(self, prompt: Prompt) -> None:
        """Forgets a prompt and frees its blocks, whatever has become of it. Calling it again does nothing."""
        if prompt in self._waiting:
            self._waiting.remove(prompt)
        elif prompt in self._holding:
            del self._holding[prompt]
            self._pool.free(prompt.sequence.blocks)
            prompt.sequence.blocks = []

    def step(self) -> bool:
        """Computes a chunk of some prompts."""
        self._admit()
        computing = [prompt for prompt in self._holding if prompt.sequence.remaining]
        self._cores.prompts = len(computing) + len(self._waiting) if computing else 0
        if not computing:
            return False
        demands = [Demand(p.sequence.request.priority, p.arrival, p.sequence.remaining) for p in computing]
        shares = share_budget(demands, self._batch_tokens, self._chunk_tokens)
        chosen = [prompt for prompt, share in zip(computing, shares, strict=True) if share]
        for prompt in chosen:
            self._begin(prompt)
        parts = [
            Part(prompt.sequence, min(share, prompt.sequence.remaining))
            for prompt, share in zip(computing, shares, strict=True)
            if share
        ]
        try:
            with self._cores.computing():
                outcomes = run_step(self._engine, parts)
        except GroupError:  # the ranks have lost each other: no step can follow
            raise
        except Exception as error:  # these prompts' blocks may hold anything, and nobody else's do
            self._fail(chosen, internal(error))
            return True
        self._steps += 1
        for prompt, outcome in zip(chosen, outcomes, strict=True):
            self._advance(prompt, outcome)
        return True

    def load(self) -> Load:
        queued = (*self._waiting, *self._holding)
        return Load(
            running=len(self._holding),
            waiting=len(self._waiting),
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_total,
            queued_tokens=sum(prompt.sequence.remaining for prompt in queued),
            steps=self._steps,
            exports=sum(prompt.announced_tokens > prompt.skip_tokens for prompt in self._holding),
            allocated_blocks=self._pool.num_allocated,
        )

    def take_events(self) -> list[tuple[Callable[[Any], None], Any]]:
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        while self._waiting and len(self._holding) < self._max_running:
            prompt = self._waiting[0]
            if not self._reserve(prompt):
                return
            self._holding[self._waiting.pop(0)] = None

    def _reserve(self, prompt: Prompt) -> bool:
        sequence = prompt.sequence
        cached = self._match(prompt)
        try:
            own = self._pool.allocate(sequence.blocks_for_tokens(self._pool.block_tokens) - len(cached))
        except OutOfBlocks:
            self._pool.free(cached)
            return False
        sequence.blocks = cached + own
        self._use_cached(prompt, len(cached))
        return True

    def _begin(self, prompt: Prompt) -> None:
        """Before the first chunk: looks again for what others, who began alike, have computed since the reservation."""
        if prompt.started_s is not None:
            return
        prompt.started_s = time.monotonic()
        sequence = prompt.sequence
        cached = self._match(prompt)
        if len(cached) * self._pool.block_tokens > sequence.num_computed:
            sequence.blocks, replaced = cached + sequence.blocks[len(cached) :], sequence.blocks[: len(cached)]
            self._pool.free(replaced)
            self._use_cached(prompt, len(cached))
        else:
            self._pool.free(cached)
        self._announce(prompt)

    def _match(self, prompt: Prompt) -> list[int]:
        """Cached blocks, referenced; at least one token is left to compute, whose logits are wanted."""
        if not prompt.uses_cache:
            return []
        tokens = prompt.sequence.tokens
        return self._pool.match(tokens, prompt.sequence.request.cache_salt, len(tokens) - 1)

    def _use_cached(self, prompt: Prompt, num_blocks: int) -> None:
        prompt.cached_tokens = prompt.sequence.num_computed = num_blocks * self._pool.block_tokens

    def _advance(self, prompt: Prompt, outcome: Outcome) -> None:
        if outcome.error:
            self._fail([prompt], internal(outcome.error))
            return
        sequence = prompt.sequence
        prompt.prompt_logprobs += outcome.prompt_logprobs
        self._pool.commit(sequence.tokens, sequence.blocks, sequence.request.cache_salt, sequence.num_computed)
        self._announce(prompt)
        if outcome.sampled:
            now = time.monotonic()
            started_s = prompt.started_s or now
            done = Done(
                tokens=list(zip(sequence.indices, outcome.sampled, strict=True)),
                prompt_logprobs=prompt.prompt_logprobs,
                cached_tokens=prompt.cached_tokens,
                queue_s=started_s - prompt.arrived_s,
                compute_s=now - started_s,
            )
            self._emit(prompt, done)

    def _announce(self, prompt: Prompt) -> None:
        """Tells of the blocks that have become final and that decode does not hold."""
        sequence, block_tokens = prompt.sequence, self._pool.block_tokens
        first = max(prompt.announced_tokens, prompt.skip_tokens)
        end = sequence.num_computed if not sequence.remaining else sequence.num_computed // block_tokens * block_tokens
        if end > first:
            blocks = sequence.blocks[first // block_tokens : -(-end // block_tokens)]
            self._emit(prompt, Computed(blocks, first, end - first, self._engine.mark()))
            prompt.announced_tokens = end

    def _fail(self, prompts: list[Prompt], error: RpcError) -> None:
        for prompt in prompts:
            self.release(prompt)
            self._emit(prompt, Failed(error))

    def _emit(self, prompt: Prompt, event: Event) -> None:
        self._events.append((prompt.receive, event))
