"""A bounded number of requests in progress, and a bounded queue before them.

    async with admission.place(priority=0, budget=budget):
        ...

The higher priority goes first, among equals the earlier. A request leaves the queue when its budget is spent or its
client goes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.budget import Budget
from shared.rpc import exhausted

_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 30.0


class Admission:
    """Places for `max_running` requests, and a queue for `max_queued` more.

    on_queue: told the queue's length whenever it changes.
    """

    def __init__(
        self, max_running: int, max_queued: int, on_queue: Callable[[int], None] = lambda length: None
    ) -> None:
        self.max_running, self.max_queued = max_running, max_queued
        self.running = 0
        self._heap: list[tuple[int, int, asyncio.Future[None]]] = []
        self._queued = 0  # entries of the heap whose request still waits
        self._arrivals = itertools.count()
        self._on_queue = on_queue
        self._seconds_per_leave = 0.0
        self._last_leave = time.monotonic()

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return self._queued

    @asynccontextmanager
    async def place(self, priority: int, budget: Budget) -> AsyncIterator[None]:
        """Holds a place. Raises RESOURCE_EXHAUSTED if the queue is full, DEADLINE_EXCEEDED if the budget ends first."""
        await self._enter(priority, budget)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, priority: int, budget: Budget) -> None:
        if self.running < self.max_running and not self._queued:
            self.running += 1
            return
        if self._queued >= self.max_queued:
            raise exhausted(
                f"{self.running} requests are in progress and {self._queued} wait, as many as this gateway takes",
                self.retry_after_s,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (-priority, next(self._arrivals), turn))
        self._count(+1)
        try:
            async with budget.enforce():
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()  # the place came at the very moment the request left
            else:
                turn.cancel()
                self._count(-1)
                self._prune()
            if isinstance(error, TimeoutError):
                raise budget.spent("in the gateway's queue") from None
            raise

    def _leave(self) -> None:
        now = time.monotonic()
        self._seconds_per_leave += 0.1 * (now - self._last_leave - self._seconds_per_leave)
        self._last_leave = now
        self.running -= 1
        while self._heap and self.running < self.max_running:
            _, _, turn = heapq.heappop(self._heap)
            if not turn.done():
                turn.set_result(None)
                self._count(-1)
                self.running += 1

    @property
    def retry_after_s(self) -> float:
        """When a place in the queue may be free, from the recent pace."""
        return min(max(self._seconds_per_leave * (1 + self._queued / 4), _MIN_RETRY_S), _MAX_RETRY_S)

    def _prune(self) -> None:
        """Entries of requests that left must not pile up behind a place that stays taken."""
        if len(self._heap) > 2 * self._queued + 16:
            self._heap = [entry for entry in self._heap if not entry[2].done()]
            heapq.heapify(self._heap)

    def _count(self, change: int) -> None:
        self._queued += change
        self._on_queue(self._queued)
