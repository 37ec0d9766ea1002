"""The decode scheduler, driven step by step over a tiny engine: nothing here waits for anything."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import decode_worker.scheduler as scheduler_module
from decode_worker.group import Ended, Event, Failed, Group, NewTokens, Reserved
from decode_worker.scheduler import DecodeScheduler
from kernels.kv_format import GREATEST
from shared.block_pool import BlockPool
from shared.engine import Engine
from shared.step import Outcome, Part, run_step
from shared.swap_space import SwapSpace
from tests.ahead import AheadEngine
from tests.engines import tiny_engine, token_request
from tests.workers import Request, sampling

MakeModel = Callable[[str], Path]


class Bench:
    """A scheduler, and the events of each of its requests."""

    def __init__(
        self,
        engine: Engine,
        *,
        num_blocks: int = 64,
        swap_blocks: int | None = None,
        chunk_tokens: int = 64,
        batch_tokens: int | None = None,
        max_running: int = 64,
        max_waiting: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        self.engine = engine
        self.pool = BlockPool(num_blocks, 16, prefix_cache=prefix_cache, model_digest="tiny")
        self.swap = None if swap_blocks is None else SwapSpace(engine.caches, swap_blocks * engine.kv.block_bytes)
        self.scheduler = DecodeScheduler(
            engine,
            self.pool,
            chunk_tokens=chunk_tokens,
            batch_tokens=batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            swap=self.swap,
        )
        self.events: dict[Group, list[Event]] = {}

    def submit(self, request: Request) -> Group:
        events: list[Event] = []
        group = Group(token_request(self.engine, request), events.append, time.monotonic())
        self.events[group] = events
        self.scheduler.submit(group)
        self.deliver()
        return group

    def deliver(self) -> None:
        for receive, event in self.scheduler.take_events():
            receive(event)

    def begin_reserved(self) -> None:
        """Lets every reserved request prefill here, as soon as it is reserved."""
        for group, events in self.events.items():
            if [type(event) for event in events] == [Reserved]:
                self.scheduler.begin(group, 1, None)

    def step(self) -> bool:
        self.begin_reserved()
        busy = self.scheduler.step()
        self.deliver()
        return busy

    def run(self) -> None:
        """Steps until everyone has ended."""
        for _ in range(5000):
            busy = self.step()
            if all(self.ended(group) for group in self.events):
                return
            assert busy or any(type(events[-1]) is Reserved for events in self.events.values()), "stuck"
        pytest.fail("no end in sight")

    def ended(self, group: Group) -> bool:
        return bool(self.events[group]) and isinstance(self.events[group][-1], Ended | Failed)

    def tokens(self, group: Group) -> dict[int, list[int]]:
        outputs: dict[int, list[int]] = {}
        for event in self.events[group]:
            assert not isinstance(event, Failed), event.error
            for token in event.tokens if isinstance(event, NewTokens) else ():
                output = outputs.setdefault(token.index, [])
                assert token.position == len(output), "a token is lost or repeated"
                if token.sampled:
                    output.append(token.sampled.token_id)
        return outputs

    def preemptions(self, group: Group) -> int:
        return max(event.preemptions for event in self.events[group] if isinstance(event, NewTokens))

    def check_empty(self) -> None:
        load = self.scheduler.load()
        assert (load.running, load.waiting, load.allocated_blocks, load.queued_tokens) == (0, 0, 0, 0)
        assert load.free_blocks == self.pool.num_total
        assert self.swap is None or self.swap.used_bytes == 0


@pytest.fixture(params=["at once", "ahead"])
def engine(request: pytest.FixtureRequest, tiny_model: MakeModel) -> Engine:
    engine = tiny_engine(tiny_model("llama"))
    return engine if request.param == "at once" else AheadEngine(engine)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, 380) for _ in range(length)]


def mixed_request(seed: int, max_tokens: int = 40) -> Request:
    rng = random.Random(seed)
    params = sampling(
        max_tokens=max_tokens,
        temperature=rng.choice((0.0, 0.8, 1.3)),
        top_k=rng.choice((0, 20)),
        seed=seed,
        repetition_penalty=rng.choice((1.0, 1.2)),
        **rng.choice(({}, {}, {"logprobs": 3})),
    )
    return Request(prompt(rng.choice((1, 15, 16, 17, 40)), seed), params)


def alone(engine: Engine, request: Request) -> dict[int, list[int]]:
    bench = Bench(engine.at_once if isinstance(engine, AheadEngine) else engine)
    group = bench.submit(request)
    bench.run()
    bench.check_empty()
    return bench.tokens(group)


def test_a_batch_of_mixed_parameters_gives_each_what_it_gets_alone(engine: Engine) -> None:
    requests = [mixed_request(seed, max_tokens=12) for seed in range(12)]
    bench = Bench(engine)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    for group, request in zip(groups, requests, strict=True):
        assert bench.tokens(group) == alone(engine, request)
    bench.check_empty()


@pytest.mark.parametrize("swap_blocks", [None, 0, 3, 1000], ids=["recompute", "no room to swap", "little", "swap"])
def test_preempted_sequences_come_back_to_the_same_bits(engine: Engine, swap_blocks: int | None) -> None:
    requests = [mixed_request(seed) for seed in range(6)]
    bench = Bench(engine, num_blocks=13, swap_blocks=swap_blocks)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    assert sum(bench.preemptions(group) for group in groups) > 0
    for group, request in zip(groups, requests, strict=True):
        assert bench.tokens(group) == alone(engine, request)
    bench.check_empty()


@pytest.mark.parametrize("kv_dtype", GREATEST)
def test_preempted_sequences_of_a_quantized_cache_come_back_to_the_same_bits(
    tiny_model: MakeModel, kv_dtype: str
) -> None:
    engine = tiny_engine(tiny_model("llama"), kv_dtype=kv_dtype)
    requests = [mixed_request(seed) for seed in range(4)]
    bench = Bench(engine, num_blocks=11, swap_blocks=1000)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    assert sum(bench.preemptions(group) for group in groups) > 0
    for group, request in zip(groups, requests, strict=True):
        assert bench.tokens(group) == alone(engine, request)
    bench.check_empty()


def test_preemption_while_nothing_is_cached(engine: Engine) -> None:
    requests = [mixed_request(seed) for seed in range(4)]
    bench = Bench(engine, num_blocks=11, prefix_cache=False)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    assert sum(bench.preemptions(group) for group in groups) > 0
    for group, request in zip(groups, requests, strict=True):
        assert bench.tokens(group) == alone(engine, request)


def test_the_lowest_priority_and_then_the_latest_gives_way(engine: Engine) -> None:
    bench = Bench(engine, num_blocks=10)
    params = sampling(max_tokens=60)
    low = bench.submit(Request(prompt(16, 1), params, priority=-1))
    first = bench.submit(Request(prompt(16, 2), params))
    last = bench.submit(Request(prompt(16, 3), params))
    bench.run()
    assert bench.preemptions(first) == 0
    assert bench.preemptions(low) > 0
    order = {group: index for index, group in enumerate((low, first, last))}
    assert bench.preemptions(low) >= bench.preemptions(last), order


def test_one_sequence_may_take_the_whole_pool(engine: Engine) -> None:
    # 4 blocks hold 64 tokens, and the last token needs no place
    bench = Bench(engine, num_blocks=5)
    group = bench.submit(Request(prompt(16), sampling(max_tokens=49)))
    other = bench.submit(Request(prompt(17), sampling(max_tokens=48)))
    bench.run()
    assert len(bench.tokens(group)[0]) == 49
    assert len(bench.tokens(other)[0]) == 48
    bench.check_empty()


@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("num_blocks", [64, 9], ids=["roomy", "tight"])
def test_outputs_of_one_prompt_part_and_share_its_full_blocks(engine: Engine, length: int, num_blocks: int) -> None:
    params = sampling(max_tokens=24, temperature=1.0, n=4)
    bench = Bench(engine, num_blocks=num_blocks)
    group = bench.submit(Request(prompt(length), params))
    bench.run()
    tokens = bench.tokens(group)
    assert sorted(tokens) == [0, 1, 2, 3]
    assert len({tuple(output) for output in tokens.values()}) == 4
    for index, output in tokens.items():
        single = Bench(engine)
        request = token_request(engine, Request(prompt(length), params), output_indices=[index])
        events: list[Event] = []
        lone = Group(request, events.append, 0.0)
        single.events[lone] = events
        single.scheduler.submit(lone)
        single.deliver()
        single.run()
        assert single.tokens(lone)[index] == output
    bench.check_empty()


def test_forks_hold_a_full_block_once(engine: Engine) -> None:
    bench = Bench(engine)
    bench.submit(Request(prompt(40), sampling(max_tokens=8, temperature=1.0, n=4)))
    bench.step()
    # 2 full blocks shared, and 4 partly filled ones
    assert bench.scheduler.load().allocated_blocks == 6
    bench.run()
    bench.check_empty()


def test_finish_ends_the_outputs_it_names(engine: Engine) -> None:
    bench = Bench(engine)
    group = bench.submit(Request(prompt(20), sampling(max_tokens=30, temperature=1.0, n=3)))
    for _ in range(4):
        bench.step()
    bench.scheduler.finish(group, [0, 2])
    before = bench.tokens(group)
    bench.run()
    after = bench.tokens(group)
    assert (after[0], after[2]) == (before[0], before[2])
    assert len(after[1]) == 30
    bench.check_empty()


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each step that brings a chunk of a prompt, the numbers of tokens: decoding sequences first."""
    steps: list[list[int]] = []

    def watched(engine: Engine, parts: list[Part]) -> list[Outcome]:
        steps.append([part.num_tokens for part in parts])
        return run_step(engine, parts)

    monkeypatch.setattr(scheduler_module, "run_step", watched)
    return steps


def test_with_a_budget_sequences_go_first_and_prompts_fill_the_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_steps(monkeypatch)
    requests = [Request(prompt(length, length), sampling(max_tokens=12)) for length in (70, 50, 3, 33)]
    bench = Bench(engine, batch_tokens=24, max_running=8)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    bench.check_empty()
    assert all(sum(step) <= 24 for step in steps)
    # as long as prompts are left, a step is full
    filling = [step for step in steps if max(step) > 1]
    assert all(sum(step) == 24 for step in filling[:-1])
    assert all(step == sorted(step, key=lambda tokens: tokens > 1) for step in steps)
    assert any(step[0] == 1 for step in filling)
    assert [bench.tokens(group) for group in groups] == [alone(engine, request) for request in requests]


def test_prompts_that_begin_alike_are_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came together, and those that come while the first one runs."""
    steps = watch_steps(monkeypatch)
    shared = prompt(64, 7)
    requests = [Request([*shared, *prompt(5, seed)], sampling(max_tokens=6)) for seed in range(4)]
    bench = Bench(engine, batch_tokens=69, max_running=8)
    together = [bench.submit(request) for request in requests[:3]]
    bench.step()
    bench.step()
    later = bench.submit(requests[3])
    bench.run()
    bench.check_empty()
    computed = sum(tokens for step in steps for tokens in step if tokens > 1)
    assert computed == 64 + 4 * 5
    cached = [bench.events[group][1] for group in (*together, later)]
    assert [event.cached_tokens for event in cached if isinstance(event, NewTokens)] == [0, 64, 64, 64]
    everything = [bench.tokens(group) for group in (*together, later)]
    assert everything == [alone(engine, request) for request in requests]


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole(engine: Engine) -> None:
    bench = Bench(engine, batch_tokens=80, max_running=8)
    first = bench.submit(Request(prompt(40), sampling(max_tokens=2)))
    second = bench.submit(Request(prompt(40), sampling(max_tokens=2, prompt_logprobs=1)))
    bench.run()
    reports = [len(event.prompt_logprobs) for event in bench.events[second] if isinstance(event, NewTokens)]
    assert sum(reports) == 39
    assert bench.tokens(first) == bench.tokens(second)
    bench.check_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_finish_of_every_output_ends_the_request_wherever_it_is(engine: Engine, steps: int) -> None:
    bench = Bench(engine, chunk_tokens=16)
    group = bench.submit(Request(prompt(40), sampling(max_tokens=30, n=2)))
    for _ in range(steps):
        bench.step()
    bench.scheduler.finish(group, [0])
    bench.scheduler.finish(group, [1])
    bench.deliver()
    assert isinstance(bench.events[group][-1], Ended)
    bench.check_empty()


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("swap_blocks", [None, 1000], ids=["recompute", "swap"])
def test_release_at_any_step_frees_everything(engine: Engine, steps: int, swap_blocks: int | None) -> None:
    bench = Bench(engine, num_blocks=9, swap_blocks=swap_blocks, chunk_tokens=16)
    groups = [bench.submit(Request(prompt(30, seed), sampling(max_tokens=60, n=2))) for seed in range(4)]
    for _ in range(steps * 4):
        bench.step()
    for group in groups:
        bench.scheduler.release(group)
        bench.scheduler.release(group)
    bench.check_empty()
    bench.scheduler.step()  # lands what was on its way
    assert not bench.scheduler.step()


def test_a_void_attempt_runs_again_to_the_same_tokens(engine: Engine) -> None:
    request = Request(prompt(40), sampling(max_tokens=20, temperature=1.0))
    bench = Bench(engine)
    group = bench.submit(request)
    for _ in range(5):
        bench.step()
    assert bench.tokens(group)[0]
    bench.scheduler.void(group)
    bench.deliver()
    assert isinstance(bench.events[group][-1], Reserved)
    bench.events[group][:] = bench.events[group][-1:]
    bench.scheduler.begin(group, 2, None)
    bench.run()
    assert bench.tokens(group) == alone(engine, request)
    bench.check_empty()


def test_what_was_generated_is_found_in_the_cache(engine: Engine) -> None:
    bench = Bench(engine)
    first = bench.submit(Request(prompt(20), sampling(max_tokens=40)))
    bench.run()
    # the last token's KV was never computed: 59 tokens are, and 48 of them fill blocks
    history = prompt(20) + bench.tokens(first)[0]
    second = bench.submit(Request(history, sampling(max_tokens=4)))
    reserved = bench.events[second][0]
    assert isinstance(reserved, Reserved)
    assert reserved.held_tokens == 48
    bench.run()
    assert bench.tokens(second) == alone(engine, Request(history, sampling(max_tokens=4)))


@pytest.mark.parametrize("length", [16, 32, 33])
def test_a_prompt_found_in_full_leaves_a_token_to_compute(engine: Engine, length: int) -> None:
    bench = Bench(engine)
    request = Request(prompt(length), sampling(max_tokens=4, logprobs=2))
    groups = []
    for _ in range(2):
        groups.append(bench.submit(request))
        bench.run()
    reserved = bench.events[groups[1]][0]
    assert isinstance(reserved, Reserved)
    assert reserved.held_tokens == (length - 1) // 16 * 16
    assert bench.tokens(groups[0]) == bench.tokens(groups[1])


def test_prompt_logprobs_are_the_same_whatever_the_chunk_and_the_cache(engine: Engine) -> None:
    request = Request(prompt(50), sampling(max_tokens=3, prompt_logprobs=2))
    seen = []
    for chunk_tokens in (7, 16, 64):
        bench = Bench(engine, chunk_tokens=chunk_tokens)
        for _ in range(2):
            group = bench.submit(request)
            bench.run()
            reports = [e.prompt_logprobs for e in bench.events[group] if isinstance(e, NewTokens)]
            assert [len(r) for r in reports] == [49, 0, 0]
            seen.append(reports[0])
    assert all(report == seen[0] for report in seen)


def test_the_line_is_kept_by_priority_and_then_arrival(engine: Engine) -> None:
    bench = Bench(engine, num_blocks=4, max_waiting=3)
    params = sampling(max_tokens=2)
    bench.submit(Request(prompt(40, 0), params))
    waiting = [bench.submit(Request(prompt(40, 1 + i), params, priority=p)) for i, p in enumerate((0, 5, 0))]
    assert bench.scheduler.load().waiting == 3
    refused = bench.submit(Request(prompt(40, 9), params))
    failed = bench.events[refused][0]
    assert isinstance(failed, Failed)
    assert failed.error.code.name == "RESOURCE_EXHAUSTED"
    assert failed.error.retry_after_s
    # one of a higher priority takes the place of the last in line
    urgent = bench.submit(Request(prompt(40, 10), params, priority=1))
    assert isinstance(bench.events[waiting[2]][0], Failed)
    order: list[Group] = []
    for _ in range(200):
        bench.step()
        order += [g for g in (*waiting[:2], urgent) if g not in order and bench.events[g]]
    assert order == [waiting[1], urgent, waiting[0]]
    bench.check_empty()


def test_more_outputs_than_a_step_takes_are_served_in_turn(engine: Engine) -> None:
    bench = Bench(engine, max_running=3)
    group = bench.submit(Request(prompt(20), sampling(max_tokens=6, temperature=1.0, n=5)))
    other = bench.submit(Request(prompt(21), sampling(max_tokens=6)))
    bench.run()
    assert [len(output) for output in bench.tokens(group).values()] == [6] * 5
    assert len(bench.tokens(other)[0]) == 6


def test_logits_that_are_no_distribution_fail_their_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(engine)
    good_request = Request(prompt(20, 1), sampling(max_tokens=8))
    expected = alone(engine, good_request)
    bad = bench.submit(Request(prompt(20, 2), sampling(max_tokens=8, temperature=1.0)))
    good = bench.submit(good_request)
    bench.step()
    blocks = bad.members[0].sequence.blocks
    saved = engine.kv.pool[blocks[0]].clone()
    # the poison goes with the block's old owner: it must not be cached
    engine.kv.pool[blocks[0]].fill_(0xFF)  # NaN
    while not bench.ended(bad):
        bench.step()
    engine.kv.pool[blocks[0]].copy_(saved)
    while not bench.ended(good):
        bench.step()
    failed = bench.events[bad][-1]
    assert isinstance(failed, Failed)
    assert failed.error.code.name == "INTERNAL"
    assert bench.tokens(good) == expected
    bench.check_empty()


def test_random_traffic_never_stalls_or_leaks(engine: Engine) -> None:
    rng = random.Random(3)
    bench = Bench(engine, num_blocks=12, swap_blocks=8, chunk_tokens=24, max_running=6)
    kept: list[tuple[Group, Request]] = []
    for turn in range(160):
        if turn < 120 and rng.random() < 0.4:
            request = mixed_request(rng.randrange(8), max_tokens=rng.choice((3, 20, 60)))
            request.priority = rng.choice((0, 0, 1))
            request.params.n = rng.choice((1, 1, 2))
            kept.append((bench.submit(request), request))
        bench.step()
        if kept and rng.random() < 0.12:
            bench.scheduler.release(kept.pop(rng.randrange(len(kept)))[0])
    bench.events = {group: bench.events[group] for group, _ in kept}
    bench.run()
    for group, request in kept[::4]:
        assert bench.tokens(group) == alone(engine, request)
    bench.check_empty()


def test_a_step_is_begun_before_the_tokens_of_the_one_before_are_known(tiny_model: MakeModel) -> None:
    engine = AheadEngine(tiny_engine(tiny_model("llama")))
    requests = [Request(prompt(20, seed), sampling(max_tokens=30, temperature=1.0, seed=seed)) for seed in range(3)]
    bench = Bench(engine)
    groups = [bench.submit(request) for request in requests]
    bench.run()
    for group, request in zip(groups, requests, strict=True):
        assert bench.tokens(group) == alone(engine, request)
    # the first token comes with the prompt, and the second is the first that a step ahead begins with
    assert (engine.num_launched, engine.num_fed, engine.num_waiting) == (29, 3 * 28, 0)
    bench.check_empty()


@pytest.mark.parametrize("end", range(2, 14))
def test_a_stop_token_leaves_one_step_too_many_and_nothing_else(tiny_model: MakeModel, end: int) -> None:
    engine = AheadEngine(tiny_engine(tiny_model("llama")))
    params = sampling(max_tokens=40, temperature=1.0, seed=5)
    tokens = alone(engine, Request(prompt(20), params))[0]
    params.stop_token_ids.append(tokens[end])
    other = Request(prompt(20, 2), sampling(max_tokens=30))
    expected = alone(engine, other)
    bench = Bench(engine, num_blocks=6)
    ending = bench.submit(Request(prompt(20), params))
    going = bench.submit(other)
    bench.run()
    assert bench.tokens(ending)[0] == tokens[: tokens.index(tokens[end]) + 1]
    assert bench.tokens(going) == expected
    bench.check_empty()
    again = bench.submit(Request(prompt(20), params))
    bench.run()
    assert bench.tokens(again) == bench.tokens(ending)
