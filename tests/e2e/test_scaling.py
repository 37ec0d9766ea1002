"""Workers behind DNS names, scaled up and down under load: no request fails, and each has the tokens it always has."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cli.supervisor import Member
from tests.cluster import Result
from tests.e2e.faults import ask, prompt
from tests.fleet import Fleet, Hosts
from tests.workers import Request, generate, running_worker, sampling

SETTINGS = {
    "dtype": "float32",
    "max_context": 1024,
    "prefill.num_blocks": 200,
    "decode.num_blocks": 200,
    "prefill.chunk_tokens": 32,
    "decode.max_running": 8,
    "threads": 1,
    "drain_s": 0.2,
}
# (tokens of the prompt, tokens generated): some end while their workers drain, some have to move
SHAPES = ((20, 40), (150, 12), (70, 120), (33, 60), (300, 20), (16, 250))


class Load:
    """Greedy requests, so many at once, one after the other until it is stopped; every answer is checked."""

    def __init__(self, fleet: Fleet, expected: dict[tuple[int, int], list[int]]) -> None:
        self._fleet, self._expected = fleet, expected
        self._shapes = itertools.cycle(SHAPES)
        self._stopped = False
        self._done = asyncio.Condition()
        self.results: list[Result] = []

    async def run(self) -> None:
        """One client's requests. Raises what a request raises."""
        while not self._stopped:
            length, max_tokens = shape = next(self._shapes)
            result = await self._fleet.generate(ask(prompt(length), max_tokens=max_tokens))
            assert result.outputs[0].token_ids == self._expected[shape]
            async with self._done:
                self.results.append(result)
                self._done.notify_all()

    def stop(self) -> None:
        self._stopped = True

    async def until(self, condition: Callable[[list[Result]], bool]) -> None:
        """Waits for it to hold of the results that come from now on."""
        seen = len(self.results)
        async with self._done:
            await self._done.wait_for(lambda: condition(self.results[seen:]))

    async def served_by(self, *members: Member) -> None:
        """Returns once each of them has had a part in some request that ended after this call."""
        wanted = {member.process.ready.worker_id for member in members if member.process}

        def seen(results: list[Result]) -> bool:
            found = [{*result.receipt.prefill_workers, *result.receipt.decode_workers} for result in results]
            return wanted <= set().union(*found)

        await self.until(seen)


@asynccontextmanager
async def under_load(fleet: Fleet, model: Path, clients: int) -> AsyncIterator[Load]:
    """What a single process generates is what is expected. A request that fails ends the test."""
    expected = {}
    async with running_worker("decode", model, num_blocks=200) as (_, channel):
        for length, max_tokens in SHAPES:
            answer = await generate(None, channel, Request(prompt(length), sampling(max_tokens=max_tokens)))
            expected[length, max_tokens] = answer.outputs[0].token_ids
    load = Load(fleet, expected)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(load.run())
        yield load
        load.stop()


async def test_two_of_each_become_three_and_then_one(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    hosts = Hosts(tmp_path / "hosts")
    async with Fleet(hosts, model=str(model), prefill=2, decode=2, settings=SETTINGS) as fleet:
        staying = fleet.prefill[0], fleet.decode[0]
        before = [await fleet.load(member) for member in staying]
        async with under_load(fleet, model, clients=3) as load:
            await load.served_by(*fleet.workers)
            await load.served_by(*await asyncio.gather(fleet.join("prefill"), fleet.join("decode")))
            # as compose does it, and as Kubernetes does it
            await asyncio.gather(*(fleet.leave(group[1], first="process") for group in (fleet.prefill, fleet.decode)))
            await load.until(lambda results: len(results) >= 4)
            await asyncio.gather(*(fleet.leave(group[1], first="name") for group in (fleet.prefill, fleet.decode)))
            await load.until(lambda results: len(results) >= 8)
        await fleet.settled()
        assert fleet.workers == list(staying)
        after = [await fleet.load(member) for member in staying]
        assert [load.free_blocks for load in after] == [load.free_blocks for load in before]
        text = (await fleet._http.get(f"{fleet.http_url}/metrics")).text
        assert 'code="OK"' in text
        up = [line for line in text.splitlines() if line.startswith("tandem_worker_up{")]
        assert len(up) == 2
        assert all(member.process and member.process.ready.worker_id in "".join(up) for member in staying)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_scaled_up_and_down_with_some_killed(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Four rounds; in every other one those that go are killed, and their addresses stay listed a while."""
    model = tiny_model("llama")
    hosts = Hosts(tmp_path / "hosts")
    settings = {**SETTINGS, "gateway.max_attempts": 12}
    async with Fleet(hosts, model=str(model), prefill=2, decode=2, settings=settings) as fleet:
        await fleet.generate(ask(prompt(20), max_tokens=4))
        await fleet.settled()
        before = (await fleet.resources())[fleet.gateway.name]
        async with under_load(fleet, model, clients=4) as load:
            await load.served_by(*fleet.workers)
            for turn in range(4):
                await load.served_by(*await asyncio.gather(fleet.join("prefill"), fleet.join("decode")))
                for group in (fleet.prefill, fleet.decode):
                    # down to one, the oldest first
                    await asyncio.gather(
                        *(
                            fleet.leave(member, first="name" if turn < 2 else "process", kill=turn % 2 == 1)
                            for member in group[:2]
                        )
                    )
                await load.until(lambda results: len(results) >= 12)
                await load.served_by(*await asyncio.gather(fleet.join("prefill"), fleet.join("decode")))
        await fleet.settled()
        await fleet.back_to({fleet.gateway.name: before})
