"""The scheduler of a model that embeds, step by step, over an engine that counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import grpc
import pytest
import torch
from torch import Tensor

from prefill_worker.embed_job import Embedded, EmbedFailed, EmbedJob
from prefill_worker.embed_scheduler import EmbedScheduler, finished
from shared.engine import EncoderEngine

Event = Embedded | EmbedFailed


class CountingEngine:
    """A text's vector is its tokens' sum, twice. batches: what each step computed."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.fails = False

    def encode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        if self.fails:
            raise RuntimeError("out of order")
        self.batches.append([tuple(text) for text in texts])
        return torch.tensor([[float(sum(text))] * 2 for text in texts])


class Bench:
    """A scheduler, and what became of each request."""

    def __init__(self, **limits: Any) -> None:
        self.engine = CountingEngine()
        chosen = {"batch_tokens": 10, "max_running": 4, "max_waiting": 4, **limits}
        self.scheduler = EmbedScheduler(cast(EncoderEngine, self.engine), **chosen)
        self.ended: list[tuple[EmbedJob, Event]] = []

    def submit(self, *texts: Sequence[int], priority: int = 0) -> EmbedJob:
        job = EmbedJob(
            texts, False, 2, priority, lambda event: self.ended.append((job, event)), arrived_s=time.monotonic()
        )
        self.scheduler.submit(job)
        return job

    def step(self) -> bool:
        busy = self.scheduler.step()
        for receive, event in self.scheduler.take_events():
            receive(event)
        return busy

    def run(self) -> None:
        while self.step():
            pass


def test_texts_of_a_request_come_back_in_their_order() -> None:
    bench = Bench()
    job = bench.submit(*([i] * 3 for i in range(1, 8)))
    bench.run()
    [(ended, event)] = bench.ended
    assert ended is job
    assert isinstance(event, Embedded)
    assert [vector.tolist() for vector in event.vectors] == [[3.0 * i, 3.0 * i] for i in range(1, 8)]
    assert event.queue_s >= 0 <= event.compute_s
    assert [len(batch) for batch in bench.engine.batches] == [3, 3, 1]
    load = bench.scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens, load.steps) == (0, 0, 0, 3)


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    bench = Bench()
    long, short = bench.submit(*[[1] * 5] * 20), bench.submit([2] * 5)
    bench.step()
    assert [job for job, _ in bench.ended] == [short]
    assert bench.engine.batches == [[(1,) * 5, (2,) * 5]]
    bench.run()
    assert [job for job, _ in bench.ended] == [short, long]


def test_the_higher_priority_goes_first() -> None:
    bench = Bench()
    low, high = bench.submit(*[[1] * 5] * 4), bench.submit(*[[2] * 5] * 4, priority=1)
    bench.run()
    assert [job for job, _ in bench.ended] == [high, low]
    assert bench.engine.batches[:2] == [[(2,) * 5] * 2] * 2


def test_a_text_longer_than_a_step_is_computed_by_itself() -> None:
    bench = Bench()
    bench.submit([1], [2] * 50, [3])
    bench.run()
    assert [[len(text) for text in batch] for batch in bench.engine.batches] == [[1], [50], [1]]


def test_a_released_request_is_computed_no_further() -> None:
    bench = Bench()
    gone, other = bench.submit(*[[1] * 5] * 20), bench.submit([2] * 5, [2] * 5)
    bench.step()
    for _ in range(2):
        bench.scheduler.release(gone)
    bench.run()
    assert [job for job, _ in bench.ended] == [other]
    assert sum(text[0] == 1 for batch in bench.engine.batches for text in batch) == 1
    assert bench.scheduler.load().queued_tokens == 0


def test_one_too_many_is_told_so_and_a_higher_priority_is_not() -> None:
    bench = Bench(max_running=1, max_waiting=1)
    first, last = bench.submit([1]), bench.submit([2])
    urgent = bench.submit([3], priority=1)
    bench.run()
    (refused, event), *others = bench.ended
    assert refused is last
    assert isinstance(event, EmbedFailed)
    assert event.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert event.error.retry_after_s
    assert [job for job, _ in others] == [urgent, first]


def test_a_step_that_fails_ends_its_requests_alone() -> None:
    bench = Bench(max_running=1)
    failed, waiting = bench.submit([1]), bench.submit([2])
    bench.engine.fails = True
    bench.step()
    bench.engine.fails = False
    bench.run()
    (first, error), (second, event) = bench.ended
    assert (first, second) == (failed, waiting)
    assert isinstance(error, EmbedFailed)
    assert error.error.code == grpc.StatusCode.INTERNAL
    assert isinstance(event, Embedded)


@pytest.mark.parametrize(("width", "expected"), [(3, [3 / 13, 4 / 13, 12 / 13]), (2, [0.6, 0.8])])
def test_a_vector_is_cut_and_then_normalized(width: int, expected: list[float]) -> None:
    vector = torch.tensor([3.0, 4.0, 12.0])
    torch.testing.assert_close(finished(vector, width, normalize=True), torch.tensor(expected))
    assert finished(vector, width, normalize=False).tolist() == vector[:width].tolist()
    assert finished(torch.zeros(3), width, normalize=True).tolist() == [0.0] * width
