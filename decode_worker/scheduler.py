"""Continuous batching: which requests hold blocks, and what each step computes. Runs on the engine thread.

A request waits, by priority and then arrival, until the blocks of its history can be had with one to grow by for each
sequence that is on its way; those that were preempted stand in the same line. Each step takes one token of every
running sequence, and beside them a chunk of the prompts that are computed here. With a budget of tokens per step those
get what the running sequences leave of it, so that every step is as long as the next: Dynamic SplitFuse, for workers
that do both phases.

Where the device draws the tokens, a step is launched before those of the step before are known here: what this thread
does between two steps is done while one computes. A sequence that turns out to have ended is in one step too many,
whose token nobody looks at. Its blocks may be given away at once: what is written to them next comes after that step,
which for an import the mark of its reservation says.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any

from decode_worker.group import (
    Ended,
    Event,
    Failed,
    Finish,
    Group,
    Member,
    NewToken,
    NewTokens,
    Reserved,
    State,
    spares_needed,
)
from decode_worker.residency import Residency
from shared.block_pool import BlockPool
from shared.cores import Cores
from shared.engine import Engine
from shared.engine_thread import Load
from shared.parallel.group import GroupError
from shared.rpc import RpcError, exhausted, internal, stale
from shared.sampling_params import finish_reason
from shared.sequence import Sequence
from shared.step import Launched, Outcome, Part, launch_step, run_step
from shared.swap_space import SwapSpace
from shared.token_budget import Demand, share_budget

RETRY_AFTER_S = 0.5


class DecodeScheduler:
    """chunk_tokens, max_running: prompt tokens, and sequences, in a step at most. swap: None = recompute.

    batch_tokens: of both in a step at most, more than max_running: prompts then have what sequences leave of it, and
    not chunk_tokens.
    cores: shared with other workers, whose prompts have them for up to max_pause_s after a step; default: with nobody.
    """

    def __init__(
        self,
        engine: Engine,
        pool: BlockPool,
        *,
        chunk_tokens: int,
        max_running: int,
        max_waiting: int,
        swap: SwapSpace | None,
        batch_tokens: int | None = None,
        cores: Cores | None = None,
        max_pause_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._cores, self._max_pause_s = cores or Cores(), max_pause_s
        self.pause_s = 0.0
        self._pool = pool
        self._chunk_tokens, self._batch_tokens = chunk_tokens, batch_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._residency = Residency(engine, pool, swap)
        self._waiting: list[Group] = []  # by queue_key
        self._holding: dict[Group, None] = {}  # reserved or running
        self._arrivals = 0
        self._steps = 0
        self._flight: tuple[list[Member], Launched] | None = None  # the step that is computed meanwhile
        self._events: list[tuple[Callable[[Any], None], Any]] = []

    def prepare(self) -> None:
        self._engine.use_thread()

    # -- what streams ask for ---------------------------------------------------------------------------------------

    def submit(self, group: Group) -> None:
        """Takes a request in: it gets Reserved, now or later, or RESOURCE_EXHAUSTED."""
        self._arrivals += 1
        group.arrival = self._arrivals
        self._queue(group)
        if group.state is State.WAITING and len(self._waiting) > self._max_waiting:
            # the last in line goes, which a request of a higher priority need not be
            refused = self._waiting[-1]
            error = exhausted(f"{len(self._waiting) - 1} requests wait for blocks", RETRY_AFTER_S)
            self._fail([refused], error)

    def begin(self, group: Group, attempt: int, first_tokens: Ordered[tuple[int, int]] | None) -> None:
        """Lets a reserved request run: its outputs' (index, first token), or None to compute the prompt here."""
        if group.state is not State.RESERVED:
            return
        sequence = Sequence.start(group.request)
        sequence.blocks = group.blocks
        root = Member(group, sequence, spare=group.spare)
        group.state, group.attempt, group.blocks, group.spare = State.RUNNING, attempt, [], []
        if first_tokens is None:
            group.cached_tokens = sequence.num_computed = group.held_tokens or 0
            sequence.indices = tuple(index for index in sequence.indices if index not in group.unwanted)
            group.members = [root]
            self._residency.enter(root)
            return
        sequence.num_computed = len(sequence.tokens)
        self._pool.commit(sequence.tokens, sequence.blocks, group.request.cache_salt, sequence.num_known)
        wanted = [(index, token_id) for index, token_id in first_tokens if index not in group.unwanted]
        position = group.request.position + 1
        ends = [NewToken(i, position, None, self._finish(group, token_id, position)) for i, token_id in wanted]
        going = [token for token, end in zip(wanted, ends, strict=True) if end.finish is None]
        group.members = self._residency.part(root, going)
        self._tell(group, [end for end in ends if end.finish])

    def void(self, group: Group) -> None:
        """Takes back an attempt that has begun: the request stands in line again, where it stood."""
        if group.state is State.RUNNING:
            self._leave(group, cache=True)
            group.attempt = 0
            self._queue(group)

    def finish(self, group: Group, indices: Ordered[int]) -> None:
        """Ends outputs whose client needs no more."""
        if group.state is State.ENDED:
            return
        group.unwanted.update(indices)
        for member in list(group.members):
            member.sequence.indices = tuple(i for i in member.sequence.indices if i not in group.unwanted)
            if not member.sequence.indices:
                self._remove(member)
        if group.unwanted.issuperset(group.request.output_indices):
            self.release(group)
            self._emit(group, Ended(group.attempt))
        elif group.state is State.RUNNING:
            self._tell(group, [])

    def release(self, group: Group) -> None:
        """Forgets a request and frees its blocks, whatever has become of it. Calling it again does nothing."""
        self._leave(group, cache=True)

    # -- the engine's turn ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Computes the next token of every running sequence, and a chunk of prompts."""
        self._admit()
        num_preempted = len(self._residency.preempted)
        chosen, parts = self._plan()
        self.pause_s = 0.0
        flight, self._flight = self._flight, None
        self._flight = self._launch(chosen, parts, flight and flight[1])
        if flight:
            self._land(*flight)
        if flight or self._flight:
            return True
        if not parts:
            return len(self._residency.preempted) > num_preempted
        begun_s = time.monotonic()
        try:
            with self._cores.computing():
                outcomes = run_step(self._engine, parts)
        except GroupError:  # the ranks have lost each other: no step can follow
            raise
        except Exception as error:  # these sequences' blocks may hold anything, and nobody else's do
            self._fail(list(dict.fromkeys(member.group for member in chosen)), internal(error))
            return True
        self._steps += 1
        self._advance(chosen, outcomes)
        self.pause_s = self._cores.pause_s(time.monotonic() - begun_s, len(parts), self._max_pause_s)
        return True

    def _launch(
        self, chosen: list[Member], parts: list[Part], before: Launched | None
    ) -> tuple[list[Member], Launched] | None:
        """None: there is nothing to compute, or it cannot be launched ahead."""
        try:
            launched = launch_step(self._engine, parts, before) if parts else None
        except Exception as error:
            self._fail(list(dict.fromkeys(member.group for member in chosen)), internal(error))
            return None
        if launched is None:
            return None
        self._steps += 1
        return chosen, launched

    def _land(self, chosen: list[Member], launched: Launched) -> None:
        """Takes in what a launched step brought; some of its members may have left."""
        here = [row for row, member in enumerate(chosen) if member in member.group.members]
        try:
            outcomes = launched.collect()
        except Exception as error:
            self._fail(list(dict.fromkeys(chosen[row].group for row in here)), internal(error))
            return
        self._advance([chosen[row] for row in here], [outcomes[row] for row in here])

    def load(self) -> Load:
        preempted = self._residency.preempted
        resting = {m.group for m in preempted} - {m.group for m in self._residency.running}
        pending = [m.sequence.remaining for m in (*self._residency.running, *preempted)]
        return Load(
            running=len(self._holding) - len(resting),
            waiting=len(self._waiting) + len(resting),
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_total,
            queued_tokens=sum(remaining for remaining in pending if remaining > 1),
            steps=self._steps,
            allocated_blocks=self._pool.num_allocated,
        )

    def take_events(self) -> list[tuple[Callable[[Any], None], Any]]:
        events, self._events = self._events, []
        return events

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Serves the line, strictly in order, so that a large request is not passed by small ones for ever."""
        running, preempted = self._residency.running, self._residency.preempted
        while preempted or self._waiting:
            reserved = sum(len(g.request.output_indices) for g in self._holding if g.state is State.RESERVED)
            margin = len(running) + reserved
            if preempted and (not self._waiting or preempted[0].queue_key < self._waiting[0].queue_key):
                if len(running) >= self._max_running or not self._residency.resume(preempted[0], margin):
                    return
                continue
            group = self._waiting[0]
            active = margin + len(preempted)
            if active and active + len(group.request.output_indices) > self._max_running:
                return
            if not self._reserve(group, margin):
                return

    def _reserve(self, group: Group, margin: int) -> bool:
        """False: it has to wait on."""
        request, block_tokens = group.request, self._pool.block_tokens
        num_tokens = len(request.token_ids)
        cached: list[int] = []
        if request.params.prompt_logprobs is None:
            # one token is left to import or compute; after a void, the gateway's word about what is held still binds
            limit = num_tokens - 1 if group.held_tokens is None else group.held_tokens
            cached = self._pool.match(request.token_ids, request.cache_salt, limit)
        if len(cached) * block_tokens < (group.held_tokens or 0):
            self._pool.free(cached)
            self._fail([group], stale(f"the first {group.held_tokens} tokens are not held here any more"))
            return True
        num_spare = spares_needed(num_tokens, len(request.output_indices), block_tokens)
        missing = -(-num_tokens // block_tokens) - len(cached) + num_spare
        if missing + margin > self._pool.num_free:
            self._pool.free(cached)
            return False
        self._waiting.remove(group)
        fresh = self._pool.allocate(missing)
        group.blocks, group.spare = cached + fresh[: missing - num_spare], fresh[missing - num_spare :]
        group.held_tokens = len(cached) * block_tokens
        group.state = State.RESERVED
        self._holding[group] = None
        queue_s, mark = time.monotonic() - group.arrived_s, self._engine.mark()
        self._emit(group, Reserved(list(group.blocks), group.held_tokens, queue_s, mark))
        return True

    def _plan(self) -> tuple[list[Member], list[Part]]:
        """Who takes part in the step. Growing takes blocks from the end of the line only, from nobody chosen before."""
        decoding: list[Member] = []
        computing: list[Member] = []
        index = 0
        running = self._residency.running
        while index < len(running) and len(decoding) + len(computing) < self._max_running:
            member = running[index]
            if member.ends:
                pass  # with the token that is on its way
            elif member.sequence.remaining > 1:
                computing.append(member)
            elif self._residency.grow(member):
                decoding.append(member)
            index += 1
        demands = [Demand(m.group.request.priority, m.group.arrival, m.sequence.remaining) for m in computing]
        room = self._chunk_tokens if self._batch_tokens is None else self._batch_tokens - len(decoding)
        shares = share_budget(demands, room, room)
        chosen, parts = decoding, [Part(member.sequence, 1) for member in decoding]
        for member, share in zip(computing, shares, strict=True):
            if share:
                self._look_again(member)
                chosen.append(member)
                parts.append(Part(member.sequence, min(share, member.sequence.remaining)))
        return chosen, parts

    def _look_again(self, member: Member) -> None:
        """Before a prompt's first chunk: others that begin alike may have computed some of it since its reservation."""
        group, sequence = member.group, member.sequence
        if sequence.num_computed == group.cached_tokens and sequence.position == group.request.position:
            self._residency.take_cached(member)
            group.cached_tokens = sequence.num_computed

    # -- results ----------------------------------------------------------------------------------------------------

    def _advance(self, chosen: list[Member], outcomes: list[Outcome]) -> None:
        told: dict[Group, list[NewToken]] = {}
        for member, outcome in zip(chosen, outcomes, strict=True):
            group = member.group
            if group.state is not State.RUNNING:  # another of its outputs has failed
                continue
            if outcome.error:
                self._fail([group], internal(outcome.error))
                told.pop(group, None)
                continue
            member.prompt_logprobs += outcome.prompt_logprobs
            if member.sequence.position == group.request.position:
                self._commit(member)
            if outcome.sampled:
                told.setdefault(group, []).extend(self._accept(member, outcome))
        for group, tokens in told.items():
            self._tell(group, tokens)

    def _accept(self, member: Member, outcome: Outcome) -> list[NewToken]:
        """Adds the sampled tokens to a member, whose outputs part where it has several."""
        group, sequence = member.group, member.sequence
        position = sequence.position
        tokens = [
            NewToken(index, position, sampled, self._finish(group, sampled.token_id, position + 1))
            for index, sampled in zip(sequence.indices, outcome.sampled, strict=True)
        ]
        if len(tokens) > 1:
            going = [(t.index, t.sampled.token_id) for t in tokens if t.sampled and not t.finish]
            group.members.remove(member)
            group.members += self._residency.part(member, going)
        elif tokens[0].finish:
            self._remove(member)
        else:
            sequence.append(outcome.sampled[0].token_id)
        if position == group.request.position:
            group.prompt_logprobs = member.prompt_logprobs
        return tokens

    def _commit(self, member: Member) -> None:
        """Those who begin alike find what is computed of a prompt."""
        sequence = member.sequence
        self._pool.commit(sequence.tokens, sequence.blocks, member.group.request.cache_salt, sequence.num_known)

    def _finish(self, group: Group, token_id: int, num_output: int) -> Finish:
        return finish_reason(group.request.params, token_id, num_output, self._engine.plan.eos_token_ids)

    def _tell(self, group: Group, tokens: list[NewToken]) -> None:
        """Sends tokens, and the end once no output goes on."""
        if tokens:
            reports, group.prompt_logprobs = group.prompt_logprobs, []
            self._emit(group, NewTokens(group.attempt, tokens, group.preemptions, group.cached_tokens, reports))
        if not group.members:
            self.release(group)
            self._emit(group, Ended(group.attempt))

    def _queue(self, group: Group) -> None:
        group.state = State.WAITING
        insort(self._waiting, group, key=lambda g: g.queue_key)
        self._admit()

    def _remove(self, member: Member) -> None:
        member.group.members.remove(member)
        self._residency.leave(member, cache=True)

    def _leave(self, group: Group, *, cache: bool) -> None:
        """Takes a request out of wherever it is, with all that it holds."""
        if group.state is State.WAITING:
            self._waiting.remove(group)
        elif group.state is not State.ENDED:
            del self._holding[group]
            self._pool.free(group.blocks)
            self._pool.free(group.spare)
            for member in group.members:
                self._residency.leave(member, cache=cache)
        group.state, group.blocks, group.spare, group.members = State.ENDED, [], [], []

    def _fail(self, groups: list[Group], error: RpcError) -> None:
        for group in groups:
            self._leave(group, cache=False)
            self._emit(group, Failed(error))

    def _emit(self, group: Group, event: Event) -> None:
        self._events.append((group.receive, event))
