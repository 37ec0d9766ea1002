"""Batches of texts to turn into vectors: what each step computes. Runs on the engine thread.

The highest priority goes first. Requests of one priority take turns, a text each, so that one with few texts does not
wait behind one with many.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from prefill_worker.embed_job import Embedded, EmbedFailed, EmbedJob
from shared.cores import Cores
from shared.engine import EncoderEngine
from shared.engine_thread import Load
from shared.rpc import exhausted, internal

RETRY_AFTER_S = 0.5


class EmbedScheduler:
    """batch_tokens: of a step at most, but for a text that is longer. max_running: requests that take turns.

    cores: shared with other workers; default: with nobody.
    """

    pause_s = 0.0  # between steps

    def __init__(
        self,
        engine: EncoderEngine,
        *,
        batch_tokens: int,
        max_running: int,
        max_waiting: int,
        cores: Cores | None = None,
    ) -> None:
        self._engine = engine
        self._cores = cores or Cores()
        self._batch_tokens, self._max_running, self._max_waiting = batch_tokens, max_running, max_waiting
        self._jobs: list[EmbedJob] = []  # by queue_key
        self._arrivals = 0
        self._steps = 0
        self._events: list[tuple[Callable[[Any], None], Any]] = []

    def prepare(self) -> None:
        self._engine.use_thread()

    def submit(self, job: EmbedJob) -> None:
        """Takes a request in, or tells the last in line RESOURCE_EXHAUSTED."""
        self._arrivals += 1
        job.arrival = self._arrivals
        insort(self._jobs, job, key=lambda each: each.queue_key)
        if len(self._jobs) > self._max_running + self._max_waiting:
            refused = self._jobs.pop()
            self._emit(refused, EmbedFailed(exhausted(f"{len(self._jobs)} requests wait for vectors", RETRY_AFTER_S)))

    def release(self, job: EmbedJob) -> None:
        """Forgets a request, whatever has become of it. Calling it again does nothing."""
        if job in self._jobs:
            self._jobs.remove(job)

    def step(self) -> bool:
        """Computes a batch of texts."""
        chosen = list(self._choose())
        self._cores.prompts = len(self._jobs)
        if not chosen:
            return False
        now = time.monotonic()
        for job, _ in chosen:
            job.started_s = job.started_s or now
        try:
            with self._cores.computing():
                vectors = self._engine.encode([text for _, text in chosen])
        except Exception as error:
            for job in dict.fromkeys(job for job, _ in chosen):
                self.release(job)
                self._emit(job, EmbedFailed(internal(error)))
            return True
        self._steps += 1
        for (job, _), vector in zip(chosen, vectors, strict=True):
            job.vectors.append(finished(vector, job.width, normalize=job.normalize))
        for job in dict.fromkeys(job for job, _ in chosen):
            if len(job.vectors) == len(job.sequences):
                self._finish(job)
        return True

    def load(self) -> Load:
        running = sum(job.started_s is not None for job in self._jobs)
        return Load(
            running=running,
            waiting=len(self._jobs) - running,
            queued_tokens=sum(job.remaining for job in self._jobs),
            steps=self._steps,
        )

    def take_events(self) -> list[tuple[Callable[[Any], None], Any]]:
        events, self._events = self._events, []
        return events

    def _choose(self) -> Iterator[tuple[EmbedJob, Sequence[int]]]:
        """Texts of the next step, those of a request in their order."""
        left = self._batch_tokens
        for _, group in groupby(self._jobs[: self._max_running], key=lambda job: job.priority):
            turns = [(job, iter(job.sequences[len(job.vectors) :])) for job in group]
            while turns:
                for turn in list(turns):
                    text = next(turn[1], None)
                    if text is None:
                        turns.remove(turn)
                        continue
                    if len(text) > left and left < self._batch_tokens:
                        return
                    left -= len(text)
                    yield turn[0], text

    def _finish(self, job: EmbedJob) -> None:
        self.release(job)
        now = time.monotonic()
        started_s = job.started_s or now
        self._emit(job, Embedded(job.vectors, started_s - job.arrived_s, now - started_s))

    def _emit(self, job: EmbedJob, event: Embedded | EmbedFailed) -> None:
        self._events.append((job.receive, event))


def finished(vector: torch.Tensor, width: int, *, normalize: bool) -> torch.Tensor:
    """The first `width` values of a vector, then scaled to length 1 if that is wanted."""
    kept = vector[:width]
    return kept / kept.norm().clamp(min=1e-12) if normalize else kept
