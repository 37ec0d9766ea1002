"""Admission: bounded, by priority, within the budget, and no place lost however a request leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from gateway.admission import Admission
from gateway.budget import Budget
from shared.rpc import RpcError

LONG = Budget.of(3600)


class Client:
    """A request that stays until it is told to leave."""

    def __init__(self, admission: Admission, priority: int = 0, budget: Budget = LONG) -> None:
        self.inside = asyncio.Event()
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission, priority, budget))

    async def _run(self, admission: Admission, priority: int, budget: Budget) -> None:
        async with admission.place(priority, budget):
            self.inside.set()
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task


async def turns(count: int = 5) -> None:
    """Lets every task that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def busy(admission: Admission) -> AsyncIterator[Client]:
    """One request inside."""
    client = Client(admission)
    await client.inside.wait()
    yield client
    await client.end()


async def test_a_place_is_free_again_after_its_request() -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        async with admission.place(0, LONG):
            assert admission.running == 1
    assert admission.running == 0


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    lengths: list[int] = []
    admission = Admission(1, 1, lengths.append)
    async with busy(admission):
        waiting = Client(admission)
        await turns()
        with pytest.raises(RpcError) as refusal:
            async with admission.place(0, LONG):
                pass
        assert refusal.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.value.retry_after_s is not None
        assert 0 < refusal.value.retry_after_s <= 30
        assert admission.queued == 1
    await waiting.inside.wait()
    await waiting.end()
    assert (admission.running, admission.queued, lengths) == (0, 0, [1, 0])


async def test_the_higher_priority_goes_first_and_among_equals_the_earlier() -> None:
    admission = Admission(1, 10)
    order: list[str] = []

    async def request(name: str, priority: int) -> None:
        async with admission.place(priority, LONG):
            order.append(name)

    async with busy(admission):
        tasks = []
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
            tasks.append(asyncio.create_task(request(name, priority)))
            await turns()
    await asyncio.gather(*tasks)
    assert order == ["b", "d", "a", "c", "e"]


async def test_a_newcomer_does_not_overtake_the_queue() -> None:
    admission = Admission(1, 10)
    async with busy(admission):
        first = Client(admission)
        await turns()
    second = Client(admission, priority=9)
    await first.inside.wait()
    assert not second.inside.is_set()
    await first.end()
    await second.end()


async def test_a_spent_budget_leaves_the_queue() -> None:
    admission = Admission(1, 10)
    async with busy(admission):
        with pytest.raises(RpcError, match=r"spent in the gateway's queue") as spent:
            async with admission.place(0, Budget.of(0.01)):
                pass
        assert spent.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert admission.queued == 0


async def test_a_cancel_at_the_moment_its_turn_comes_passes_the_place_on() -> None:
    admission = Admission(1, 10)
    async with busy(admission) as client:
        unlucky, next_one = Client(admission), Client(admission)
        await turns()
        client.leave.set()
        await client.task  # the turn is the unlucky one's now, and it has not run yet
        unlucky.task.cancel()
        await asyncio.wait({unlucky.task})
        assert unlucky.task.cancelled()
    await next_one.inside.wait()
    await next_one.end()
    assert (admission.running, admission.queued) == (0, 0)


async def test_many_random_comings_and_goings_lose_no_place() -> None:
    rng = random.Random(5)
    admission = Admission(4, 50)
    most = 0

    async def request() -> None:
        nonlocal most
        async with admission.place(rng.randrange(3), LONG):
            most = max(most, admission.running)
            await turns(rng.randrange(4))

    tasks: list[asyncio.Task[None]] = []
    for _ in range(1000):
        tasks.append(asyncio.create_task(request()))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        await turns(rng.randrange(3))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, (asyncio.CancelledError, RpcError)) for result in results)
    assert (most, admission.running, admission.queued) == (4, 0, 0)


async def test_requests_that_left_do_not_pile_up_behind_a_place_that_stays_taken() -> None:
    admission = Admission(1, 10)
    async with busy(admission):
        for _ in range(500):
            left = Client(admission)
            await turns(2)
            left.task.cancel()
            await asyncio.wait({left.task})
        assert admission.queued == 0
        assert len(admission._heap) < 50
