"""Which sequences have blocks: growth, preemption and return. Runs on the engine thread.

When blocks run out the sequence of the lowest priority and, among those, of the latest arrival gives up its own: its KV
goes to host memory, or is computed again later, to the same bits. Admission has made sure that any one sequence fits
the pool alone, so the first in line always gets on, and with it, in the end, everyone.
"""

from __future__ import annotations

from bisect import insort

from decode_worker.group import Member
from shared.block_pool import BlockPool
from shared.engine import Engine
from shared.swap_space import SwapSpace


class Residency:
    """swap: None = preempted sequences are computed again."""

    def __init__(self, engine: Engine, pool: BlockPool, swap: SwapSpace | None) -> None:
        self.running: list[Member] = []  # with blocks, the first in line first
        self.preempted: list[Member] = []  # without, the first in line first
        self._engine = engine
        self._pool = pool
        self._swap = swap

    def enter(self, member: Member) -> None:
        """Takes in a member that has its blocks."""
        insort(self.running, member, key=lambda m: m.queue_key)

    def leave(self, member: Member, *, cache: bool) -> None:
        """Takes a member out and frees what it holds. cache: its KV is right, and its full blocks may be shared."""
        if member in self.running:
            self.running.remove(member)
            self._free(member, cache=cache)
        else:
            self.preempted.remove(member)
            self._drop_saved(member)

    def grow(self, member: Member) -> bool:
        """Gives a running member a block for its next token, taking from the last in line; False: that was itself."""
        sequence = member.sequence
        missing = sequence.blocks_for_tokens(self._pool.block_tokens) - len(sequence.blocks)
        while missing > self._pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is member:
                return False
        sequence.blocks += self._pool.allocate(missing)
        return True

    def take_cached(self, member: Member) -> None:
        """Has a running member share the blocks that are cached of its history, where these are more than it has
        computed; one token is left to compute, whose logits are wanted.
        """
        sequence = member.sequence
        if sequence.wants_prompt_logprobs:
            return
        cached = self._pool.match(sequence.tokens, sequence.request.cache_salt, len(sequence.tokens) - 1)
        num_tokens = len(cached) * self._pool.block_tokens
        if num_tokens <= sequence.num_computed:
            self._pool.free(cached)
            return
        own, sequence.blocks = sequence.blocks[: len(cached)], cached + sequence.blocks[len(cached) :]
        self._pool.free(own)
        sequence.num_computed = num_tokens

    def resume(self, member: Member, margin: int) -> bool:
        """Gives a preempted member blocks again, if that leaves `margin` free, and what is left of its KV."""
        sequence, block_tokens = member.sequence, self._pool.block_tokens
        num_blocks, num_spare = sequence.blocks_for_tokens(block_tokens), member.spares_needed(block_tokens)
        cached: list[int] = []
        if member.saved is None and not sequence.wants_prompt_logprobs:
            cached = self._pool.match(sequence.tokens, sequence.request.cache_salt, len(sequence.tokens) - 1)
        missing = num_blocks - len(cached) + num_spare
        if missing + margin > self._pool.num_free:
            self._pool.free(cached)
            return False
        fresh = self._pool.allocate(missing)
        sequence.blocks, member.spare = cached + fresh[: missing - num_spare], fresh[missing - num_spare :]
        if member.saved is not None and self._swap is not None:
            self._swap.restore(member.saved, sequence.blocks)
            member.saved = None
        else:
            sequence.num_computed = len(cached) * block_tokens
        self.preempted.remove(member)
        self.enter(member)
        return True

    def part(self, root: Member, next_tokens: list[tuple[int, int]]) -> list[Member]:
        """Replaces a computed prompt by its outputs, each an (index, next token), and frees what they do not need.

        They share its full blocks; of a partly filled last one all but the first get a copy.
        """
        members: list[Member] = []
        sequence = root.sequence
        full = sequence.blocks[: sequence.num_computed // self._pool.block_tokens]
        partly_filled = sequence.blocks[len(full) :]
        for order, (index, token_id) in enumerate(next_tokens):
            member = Member(root.group, sequence.fork(index, token_id), order)
            if order == 0:
                member.sequence.blocks = list(sequence.blocks)
            else:
                self._pool.share(full)
                own = [root.spare.pop() for _ in partly_filled]
                self._engine.copy_blocks(partly_filled, own)
                member.sequence.blocks = full + own
            members.append(member)
        if not members:
            self._pool.free(sequence.blocks)
        self._pool.free(root.spare)
        if root in self.running:
            self.running.remove(root)
        for member in members:
            self.enter(member)
        return members

    def _preempt(self, member: Member) -> None:
        sequence = member.sequence
        self.running.remove(member)
        if self._swap is not None and sequence.num_computed:
            member.saved = self._swap.save(sequence.blocks, sequence.num_computed)
        self._free(member, cache=True)
        if member.saved is None:
            sequence.num_computed = 0
            member.prompt_logprobs = []
        member.group.preemptions += 1
        insort(self.preempted, member, key=lambda m: m.queue_key)

    def _free(self, member: Member, *, cache: bool) -> None:
        sequence = member.sequence
        if cache:
            self._pool.commit(sequence.tokens, sequence.blocks, sequence.request.cache_salt, sequence.num_known)
        self._pool.free(sequence.blocks)
        self._pool.free(member.spare)
        sequence.blocks, member.spare = [], []

    def _drop_saved(self, member: Member) -> None:
        if member.saved is not None and self._swap is not None:
            self._swap.drop(member.saved)
            member.saved = None
