"""Two ragged engines against a model of what must be so, whatever is asked of them and in whatever order."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.engine import RaggedEngine, SchedulingError
from shared.engine.scheduling_result import SchedulingResult as R
from tests.shared.engine.ragged import LIMITS, ragged_engine
from tests.tiny_models import tiny_model

NUM_BLOCKS = 9
UIDS = st.integers(0, 5)
BLOCK_TOKENS = (8, 4)


@functools.cache
def engine(block_tokens: int) -> RaggedEngine:
    return ragged_engine(tiny_model("llama"), num_blocks=NUM_BLOCKS, block_tokens=block_tokens)


@functools.cache
def logits_of(tokens: tuple[int, ...]) -> torch.Tensor:
    """Of a whole history at once, alone."""
    reference = whole_histories()
    logits = reference.put([0], [tokens])[0]
    reference.flush(0)
    return logits


@functools.cache
def whole_histories() -> RaggedEngine:
    limits = {"max_ragged_batch_size": 64}
    return ragged_engine(tiny_model("llama"), num_blocks=8, block_tokens=16, limits=limits)


@dataclass(frozen=True)
class Sequence:
    tokens: tuple[int, ...] = ()
    is_offloaded: bool = False


class Side:
    """An engine, and what it has to be like."""

    def __init__(self, block_tokens: int) -> None:
        self.engine, self.block_tokens = engine(block_tokens), block_tokens
        self.expected: dict[int, Sequence] = {}

    def blocks(self, length: int) -> int:
        return -(-length // self.block_tokens)

    @property
    def free(self) -> int:
        held = [self.blocks(len(s.tokens)) for s in self.expected.values() if not s.is_offloaded]
        return NUM_BLOCKS - sum(held)

    def result(self, batch: dict[int, list[int]]) -> R:
        if len(batch) > LIMITS["max_ragged_sequence_count"]:
            return R.BatchSequenceLimitExceeded
        free = self.free
        for uid, tokens in batch.items():
            before = self.expected.get(uid, Sequence())
            length = len(before.tokens) + len(tokens)
            if length > LIMITS["max_context"]:
                return R.SequenceTokenLimitExceeded
            free -= self.blocks(length) - (0 if before.is_offloaded else self.blocks(len(before.tokens)))
            if before.is_offloaded or free < 0:
                return R.KVCacheLimitExceeded
        if len(self.expected.keys() | batch.keys()) > LIMITS["max_tracked_sequences"]:
            return R.EngineSequenceLimitExceeded
        if sum(map(len, batch.values())) > LIMITS["max_ragged_batch_size"]:
            return R.BatchTokenLimitExceeded
        return R.Success

    def check(self) -> None:
        engine, expected = self.engine, self.expected
        assert engine.free_blocks == self.free
        assert [s.uid for s in engine.sequences] == [*expected]
        held = [block for s in engine.sequences for block in s.blocks]
        assert len(held) == len(set(held)) == NUM_BLOCKS - self.free
        assert all(0 < block <= NUM_BLOCKS for block in held)
        assert engine._swap.used_bytes == engine.plan.layout.block_bytes * sum(
            self.blocks(len(s.tokens)) for s in expected.values() if s.is_offloaded
        )
        for s in engine.sequences:
            known = expected[s.uid]
            assert (s.seen_tokens, s.in_flight_tokens, s.is_offloaded) == (len(known.tokens), 0, known.is_offloaded)
            room = 0 if known.is_offloaded else -len(known.tokens) % self.block_tokens
            assert engine.get_remaining_block_capacity(s.uid) == room


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sides = [Side(block_tokens) for block_tokens in BLOCK_TOKENS]

    sides_of = st.integers(0, 1)
    tokens_of = st.lists(st.integers(3, 9), min_size=1, max_size=18)
    batches = st.dictionaries(UIDS, tokens_of, min_size=1, max_size=4)

    @rule(side=sides_of, batch=batches, do_checks=st.booleans())
    def put(self, side: int, batch: dict[int, list[int]], do_checks: bool) -> None:
        here = self.sides[side]
        result = here.result(batch)
        assert here.engine.can_schedule([*batch], [*map(len, batch.values())]) is result
        if result is not R.Success:
            # unchecked, it is found out on the way, as what it meets first
            refusal: Any = SchedulingError if do_checks else (RuntimeError, ValueError)
            with pytest.raises(refusal):
                here.engine.put([*batch], [*batch.values()], do_checks)
            return
        logits = here.engine.put([*batch], [*batch.values()], do_checks)
        for row, (uid, tokens) in zip(logits, batch.items(), strict=True):
            before = here.expected.get(uid, Sequence())
            here.expected[uid] = replace(before, tokens=(*before.tokens, *tokens))
            assert torch.equal(row, logits_of(here.expected[uid].tokens))

    @rule(side=sides_of, batch=batches, wrong=st.sampled_from(["token", "twice", "empty", "forward"]))
    def fail_to_put(self, side: int, batch: dict[int, list[int]], wrong: str) -> None:
        """What is wrong in itself, and a forward that raises, with the blocks already had."""
        here = self.sides[side].engine
        uids, tokens = [*batch], [list(part) for part in batch.values()]
        if wrong == "token":
            tokens[-1][-1] = 384
        elif wrong == "twice":
            uids, tokens = [*uids, uids[0]], [*tokens, tokens[0]]
        elif wrong == "empty":
            tokens[-1] = []
        with pytest.MonkeyPatch.context() as patch:
            if wrong == "forward":
                patch.setattr(here._engine, "forward", lambda entries: 1 // 0)
            with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
                here.put(uids, tokens, do_checks=False)

    @rule(side=sides_of, uid=UIDS, max_tokens=st.integers(0, 60), max_blocks=st.integers(0, NUM_BLOCKS))
    def query(self, side: int, uid: int, max_tokens: int, max_blocks: int) -> None:
        here = self.sides[side]
        tokens, blocks = here.engine.query(uid, max_tokens, max_blocks)
        known = here.expected.get(uid)
        if (known and known.is_offloaded) or (not known and len(here.expected) == LIMITS["max_tracked_sequences"]):
            assert (tokens, blocks) == (0, 0)
            return
        seen = len(known.tokens) if known else 0

        def needed(length: int) -> int:
            return here.blocks(seen + length) - here.blocks(seen)

        fitting = [n for n in range(max_tokens + 1) if needed(n) <= max_blocks and seen + n <= LIMITS["max_context"]]
        assert (tokens, blocks) == (max(fitting), needed(max(fitting)))

    @rule(side=sides_of, uid=UIDS)
    def flush(self, side: int, uid: int) -> None:
        self.sides[side].engine.flush(uid)
        self.sides[side].expected.pop(uid, None)

    @rule(side=sides_of, uid=UIDS)
    def offload(self, side: int, uid: int) -> None:
        here = self.sides[side]
        known = here.expected.get(uid)
        if known is None or known.is_offloaded:
            with pytest.raises(ValueError, match=f"uid {uid}"):
                here.engine.offload(uid)
            return
        before = here.engine.export_sequence(uid)
        here.engine.offload(uid)
        assert torch.equal(here.engine.export_sequence(uid).blocks, before.blocks)
        here.expected[uid] = replace(known, is_offloaded=True)

    @rule(side=sides_of, uid=UIDS)
    def restore(self, side: int, uid: int) -> None:
        here = self.sides[side]
        known = here.expected.get(uid)
        if known is None or not known.is_offloaded:
            with pytest.raises(ValueError, match=f"uid {uid}"):
                here.engine.restore(uid)
            return
        if here.blocks(len(known.tokens)) > here.free:
            with pytest.raises(SchedulingError, match="KVCacheLimitExceeded"):
                here.engine.restore(uid)
            return
        before = here.engine.export_sequence(uid)
        here.engine.restore(uid)
        assert torch.equal(here.engine.export_sequence(uid).blocks, before.blocks)
        here.expected[uid] = replace(known, is_offloaded=False)

    @rule(side=sides_of, uid=UIDS, as_uid=UIDS)
    def hand_over(self, side: int, uid: int, as_uid: int) -> None:
        """To the other engine, whose blocks are of another size, and back into what was exported."""
        here, there = self.sides[side], self.sides[1 - side]
        known = here.expected.get(uid)
        if known is None:
            with pytest.raises(ValueError, match=f"uid {uid}"):
                here.engine.export_sequence(uid)
            return
        state = here.engine.export_sequence(uid)
        assert state.num_tokens == len(known.tokens)
        if as_uid in there.expected:
            with pytest.raises(ValueError, match=f"uid {as_uid}: is tracked already"):
                there.engine.import_sequence(as_uid, state)
            return
        if len(there.expected) == LIMITS["max_tracked_sequences"] or there.blocks(state.num_tokens) > there.free:
            with pytest.raises(SchedulingError):
                there.engine.import_sequence(as_uid, state)
            return
        there.engine.import_sequence(as_uid, state)
        there.expected[as_uid] = replace(known, is_offloaded=False)
        assert torch.equal(rows_of(there.engine, as_uid), rows_of(here.engine, uid))

    @invariant()
    def both_are_as_they_must_be(self) -> None:
        for side in self.sides:
            side.check()

    def teardown(self) -> None:
        for side in self.sides:
            for sequence in side.engine.sequences:
                side.engine.flush(sequence.uid)
            assert side.engine.free_blocks == NUM_BLOCKS
            assert side.engine._swap.used_bytes == 0


def rows_of(engine: RaggedEngine, uid: int) -> torch.Tensor:
    """The keys and values of a sequence's tokens: [layers, 2, kv_heads, tokens, head_dim]."""
    state = engine.export_sequence(uid)
    elements = state.layout.format.elements(state.blocks).permute(1, 2, 3, 0, 4, 5)
    return elements.flatten(3, 4)[:, :, :, : state.num_tokens]


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
