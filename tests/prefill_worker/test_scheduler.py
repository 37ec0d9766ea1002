"""The prefill scheduler, driven step by step over a tiny engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefill_worker.prompt import Computed, Done, Event, Failed, Prompt
from prefill_worker.scheduler import PrefillScheduler
from shared.block_pool import BlockPool
from shared.engine import Engine
from shared.sequence import Sequence
from tests.engines import tiny_engine, token_request
from tests.workers import Request, sampling

MakeModel = Callable[[str], Path]


class Bench:
    """A scheduler, and the events of each of its prompts."""

    def __init__(
        self, engine: Engine, *, num_blocks: int = 64, batch_tokens: int = 64, prefix_cache: bool = True
    ) -> None:
        self.engine = engine
        self.pool = BlockPool(num_blocks, 16, prefix_cache=prefix_cache, model_digest="tiny")
        self.scheduler = PrefillScheduler(
            engine, self.pool, chunk_tokens=batch_tokens, batch_tokens=batch_tokens, max_running=64, max_waiting=64
        )
        self.events: dict[Prompt, list[Event]] = {}

    def submit(self, request: Request) -> Prompt:
        events: list[Event] = []
        prompt = Prompt(Sequence.start(token_request(self.engine, request)), 0, events.append, time.monotonic())
        self.events[prompt] = events
        self.scheduler.submit(prompt)
        return prompt

    def step(self) -> bool:
        busy = self.scheduler.step()
        for receive, event in self.scheduler.take_events():
            receive(event)
        return busy

    def run(self) -> None:
        while self.step():
            pass

    def done(self, prompt: Prompt) -> Done:
        done = self.events[prompt][-1]
        assert isinstance(done, Done)
        return done

    def order(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts as they are done."""
        finished: list[Prompt] = []
        while len(finished) < len(prompts):
            assert self.step()
            finished += [
                p for p in prompts if p not in finished and self.events[p] and isinstance(self.events[p][-1], Done)
            ]
        return finished


@pytest.fixture(scope="module")
def engine(tiny_model: MakeModel) -> Engine:
    return tiny_engine(tiny_model("llama"))


def tokens(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, 380) for _ in range(length)]


@pytest.mark.parametrize("batch_tokens", [1, 7, 16, 64, 512])
def test_the_first_tokens_do_not_depend_on_the_chunks(engine: Engine, batch_tokens: int) -> None:
    params = sampling(temperature=1.0, n=3, logprobs=4)
    whole, chunked = Bench(engine, batch_tokens=512), Bench(engine, batch_tokens=batch_tokens)
    expected, prompt = whole.submit(Request(tokens(50), params)), chunked.submit(Request(tokens(50), params))
    for seed in range(3):
        chunked.submit(Request(tokens(20, seed), sampling()))
    whole.run()
    chunked.run()
    assert chunked.done(prompt).tokens == whole.done(expected).tokens


def test_prompts_that_arrive_together_compute_what_they_share_once(engine: Engine) -> None:
    bench = Bench(engine, batch_tokens=64)
    shared = tokens(64)
    prompts = [bench.submit(Request(shared + tokens(8, seed), sampling())) for seed in range(6)]
    bench.run()
    assert bench.done(prompts[0]).cached_tokens == 0
    assert [bench.done(prompt).cached_tokens for prompt in prompts[2:]] == [64] * 4
    for prompt in prompts:
        announced = [e for e in bench.events[prompt] if isinstance(e, Computed)]
        assert sum(e.num_tokens for e in announced) == 72
        assert [block for e in announced for block in e.blocks] == prompt.sequence.blocks


def test_higher_priorities_are_done_first(engine: Engine) -> None:
    bench = Bench(engine, batch_tokens=16)
    low, normal, high = (bench.submit(Request(tokens(60, p), sampling(), priority=p)) for p in (-1, 0, 7))
    assert bench.order([low, normal, high]) == [high, normal, low]


def test_a_long_prompt_goes_on_behind_a_stream_of_short_ones(engine: Engine) -> None:
    bench = Bench(engine, batch_tokens=32)
    long = bench.submit(Request(tokens(320), sampling()))
    steps = 0
    while not any(isinstance(event, Done) for event in bench.events[long]):
        bench.scheduler.release(bench.submit(Request(tokens(16, steps), sampling())))
        short = bench.submit(Request(tokens(30, steps), sampling()))
        bench.step()
        bench.step()
        bench.scheduler.release(short)
        steps += 2
    # half of each step
    assert steps <= 320 // 16 + 2


def test_a_prompt_waits_until_all_its_blocks_can_be_had(engine: Engine) -> None:
    bench = Bench(engine, num_blocks=7, prefix_cache=False)
    first = bench.submit(Request(tokens(64), sampling()))
    second = bench.submit(Request(tokens(64, 1), sampling()))
    bench.run()
    assert isinstance(bench.events[first][-1], Done)
    assert bench.events[second] == []
    assert bench.scheduler.load().waiting == 1
    bench.scheduler.release(first)
    bench.run()
    assert isinstance(bench.events[second][-1], Done)
    bench.scheduler.release(second)
    bench.scheduler.release(second)
    assert bench.scheduler.load().allocated_blocks == 0


@pytest.mark.parametrize("steps", range(5))
def test_release_at_any_step_frees_everything(engine: Engine, steps: int) -> None:
    bench = Bench(engine, num_blocks=12, batch_tokens=16)
    prompts = [bench.submit(Request(tokens(50, seed), sampling())) for seed in range(4)]
    for _ in range(steps):
        bench.step()
    for prompt in prompts:
        bench.scheduler.release(prompt)
    load = bench.scheduler.load()
    assert (load.running, load.waiting, load.allocated_blocks, load.queued_tokens, load.exports) == (0, 0, 0, 0, 0)
    assert not bench.step()


def test_logits_that_are_no_distribution_fail_their_prompt_alone(engine: Engine) -> None:
    bench = Bench(engine, batch_tokens=64)
    bad = bench.submit(Request(tokens(100, 1), sampling(temperature=1.0)))
    good = bench.submit(Request(tokens(20, 2), sampling()))
    bench.step()
    block = bad.sequence.blocks[0]
    engine.kv.pool[block].fill_(0xFF)  # NaN
    bench.run()
    engine.kv.pool[block].zero_()
    failed = bench.events[bad][-1]
    assert isinstance(failed, Failed)
    assert failed.error.code.name == "INTERNAL"
    assert bench.done(good).tokens
    assert bench.scheduler.load().running == 1
