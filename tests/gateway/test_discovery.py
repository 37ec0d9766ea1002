"""Workers behind names: addresses that come and go in a resolver's answers, and what becomes of requests meanwhile."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

import gateway.discovery as module
from gateway.changes import Changes
from gateway.discovery import Entry, resolve
from gateway.gateway import Gateway
from gateway.metrics import Metrics
from gateway.worker import DECODE, PREFILL, Worker
from gateway.workers import StartError, Workers
from shared.config import TandemConfig
from shared.rpc import RpcError
from tests.scripted_scene import Scene, model, request, scene_of
from tests.scripted_workers import Conversation, ScriptedDecode, ScriptedPrefill, ScriptedWorker, expected_tokens

PROMPT = [70, 71, 72, 73, 74]
FIRST, SECOND, THIRD, FOURTH = (f"127.0.0.{last}" for last in (2, 3, 4, 5))


def free_port() -> int:
    """Of all loopback addresses, hopefully: nobody else has the number that the kernel gives for one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Names:
    """A resolver whose answers the test gives: addresses by name, or what is raised instead."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self._changes = Changes()

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answer = self.answers[host]
        self._changes.announce()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer(self, answer: Any) -> None:
        """From now on the answer for every name."""
        for name in self.answers:
            self.answers[name] = answer

    async def answered(self) -> None:
        """Returns once every name has been looked up, and what came of it is known, after this call."""
        for name in self.answers:
            # the second look-up begins when the first is over
            seen = len(self.asked)
            while self.asked[seen:].count(name) < 2:
                await self._changes.next()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_UP_S", 0.01)


@asynccontextmanager
async def named(names: Names, prefill: int = 1, decode: int = 1, **options: Any) -> AsyncIterator[Scene]:
    """A scene whose workers of a kind share a port, at 127.0.0.2, 127.0.0.3 and so on, and a name."""
    ports = {"prefill": free_port(), "decode": free_port()}
    prepare: Callable[[Scene], None] | None = options.pop("prepare", None)

    def place(scene: Scene) -> None:
        for kind, workers in (("prefill", scene.prefills), ("decode", scene.decodes)):
            for i, worker in enumerate(workers):
                worker.target = f"127.0.0.{i + 2}:{ports[kind]}"
        if prepare is not None:
            prepare(scene)

    lists = {f"{kind}_workers": (f"{kind}:{port}",) for kind, port in ports.items()}
    async with scene_of(prefill, decode, place, names, **{**lists, **options}) as scene:
        try:
            yield scene
        finally:
            for worker in (*scene.prefills, *scene.decodes):
                await worker.kill()


async def start(scene: Scene, worker: ScriptedWorker, beside: ScriptedWorker, address: str) -> None:
    """One more worker, at another address and the port of one that is there."""
    worker.target = f"{address}:{beside.target.rpartition(':')[2]}"
    await worker.start()
    if isinstance(worker, ScriptedDecode):
        scene.decodes.append(worker)
    if isinstance(worker, ScriptedPrefill):
        scene.prefills.append(worker)


def known(scene: Scene, worker: ScriptedWorker) -> Worker | None:
    """The worker as the gateway has it."""
    return next((one for one in scene.gateway.workers._all if one.target == worker.target), None)


async def forgotten(scene: Scene, worker: ScriptedWorker) -> None:
    while known(scene, worker):
        await scene.gateway.workers.changes.next()


class Held:
    """A script of a decode worker: two tokens, and the rest when it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()

    async def __call__(self, worker: ScriptedDecode, conversation: Conversation) -> AsyncIterator[Any]:
        yield conversation.reserved()
        await conversation.read_until("begin")
        yield conversation.imported()
        histories = conversation.histories()
        yield conversation.tokens(histories, 1)
        self.begun.set()
        await self.go.wait()
        while (reply := conversation.tokens(histories, 1)).tokens.outputs:
            yield reply


# -- a name and its addresses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["127.0.0.1:50071", "[::1]:50071", "10.1.2.3:1"])
async def test_an_address_is_its_own(name: str) -> None:
    entry = Entry(name, DECODE, Names())
    assert (entry.literal, entry.targets, str(entry)) == (True, (name,), f"decode worker {name}")


async def test_the_systems_resolver_knows_localhost() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)


async def test_a_name_stands_for_each_address_once() -> None:
    entry = Entry("decode:50071", DECODE, Names(decode=["10.0.0.7", "fd00::7", "10.0.0.7", "fd00:0::7"]))
    await entry._look_up()
    assert entry.targets == ("10.0.0.7:50071", "[fd00::7]:50071")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (socket.gaierror(-2, "Name or service not known"), "does not resolve: .*not known"),
        (UnicodeError("label too long"), "does not resolve: label too long"),
        ([], "has no address"),
    ],
)
async def test_no_answer_keeps_what_is_known(answer: Any, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    names = Names(decode=["10.0.0.7"])
    entry = Entry("decode:50071", DECODE, names)
    await entry._look_up()
    names.answers["decode"] = answer
    for _ in range(3):
        await entry._look_up()
    assert entry.targets == ("10.0.0.7:50071",)
    [record] = caplog.records  # once, not at every look-up
    assert record.message.startswith("decode worker decode:50071 (its name ")
    assert record.message.endswith("; 10.0.0.7:50071 stay")
    assert re.search(problem, str(entry))
    names.answers["decode"] = ["10.0.0.8"]
    await entry._look_up()
    assert (entry.targets, entry.problem) == (("10.0.0.8:50071",), "")


# -- workers come and go -----------------------------------------------------------------------------------------------


async def test_a_worker_for_each_address_of_a_name() -> None:
    async with named(Names(prefill=[FIRST, SECOND], decode=[FIRST, SECOND]), prefill=2, decode=2) as scene:
        await scene.alive(*scene.prefills, *scene.decodes)
        for decode in scene.decodes:
            assert set(decode.connects) == {prefill.target for prefill in scene.prefills}
        receipts = [(await scene.collect(request([70 + i] * 5))).last.receipt for i in range(4)]
        assert {receipt.decode_workers[0] for receipt in receipts} == {"d0#1", "d1#1"}
        assert {receipt.prefill_workers[0] for receipt in receipts} == {"p0#1", "p1#1"}
        name = scene.gateway.workers._entries[1].name
        assert str(known(scene, scene.decodes[1])) == f"decode worker {name} at {SECOND} (d1#1)"


async def test_one_more_shakes_hands_before_it_takes_requests() -> None:
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        decode, prefill = ScriptedDecode("d1"), ScriptedPrefill("p1")
        await start(scene, prefill, scene.prefill, SECOND)
        await start(scene, decode, scene.decode, SECOND)
        names.answers = {"prefill": [FIRST, SECOND], "decode": [SECOND, FIRST]}
        await scene.alive(prefill, decode)
        assert set(decode.connects) == {scene.prefill.target, prefill.target}
        assert prefill.target in scene.decode.connects
        receipts = [(await scene.collect(request([70 + i] * 5))).last.receipt for i in range(4)]
        assert {receipt.decode_workers[0] for receipt in receipts} == {"d0#1", "d1#1"}
        assert {receipt.prefill_workers[0] for receipt in receipts} == {"p0#1", "p1#1"}


async def test_what_runs_on_a_worker_that_is_listed_no_more_comes_to_its_end() -> None:
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        held = scene.decode.script = Held()
        running = asyncio.create_task(scene.collect(request(PROMPT, max_tokens=8)))
        await held.begun.wait()
        other = ScriptedDecode("d1")
        await start(scene, other, scene.decode, SECOND)
        names.answers["decode"] = [SECOND]
        await scene.alive(other)
        await names.answered()
        for _ in range(3):
            assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d1#1"]
        assert known(scene, scene.decode)
        held.go.set()
        collected = await running
        assert collected.token_ids == {0: expected_tokens(PROMPT, 8)}
        assert (collected.last.receipt.decode_workers, collected.last.receipt.attempts) == (["d0#1"], 1)
        await forgotten(scene, scene.decode)


async def test_an_export_outlives_its_workers_address() -> None:
    """The prefill worker is listed no more between its first token and the import."""
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        begun, imported = asyncio.Event(), asyncio.Event()

        async def script(worker: ScriptedDecode, conversation: Conversation) -> AsyncIterator[Any]:
            yield conversation.reserved()
            await conversation.read_until("begin")
            begun.set()
            await imported.wait()
            yield conversation.imported()
            histories = conversation.histories()
            while (reply := conversation.tokens(histories, 1)).tokens.outputs:
                yield reply

        scene.decode.script = script
        running = asyncio.create_task(scene.collect(request(PROMPT)))
        await begun.wait()
        other = ScriptedPrefill("p1")
        await start(scene, other, scene.prefill, SECOND)
        names.answers["prefill"] = [SECOND]
        await scene.alive(other)
        await names.answered()
        assert scene.prefill.open_streams == 1
        imported.set()
        receipt = (await running).last.receipt
        assert (receipt.prefill_workers, receipt.attempts) == (["p0#1"], 1)
        await forgotten(scene, scene.prefill)


async def test_a_worker_that_is_missed_stays() -> None:
    """The address that takes its place does not answer yet."""
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        names.answers["decode"] = [SECOND]
        await names.answered()
        assert scene.gateway.serving
        assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d0#1"]
        other = ScriptedDecode("d1")
        await start(scene, other, scene.decode, SECOND)
        await scene.alive(other)
        await forgotten(scene, scene.decode)
        assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d1#1"]


async def test_a_restarted_worker_may_have_another_address() -> None:
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        held = scene.decode.script = Held()
        running = asyncio.create_task(scene.collect(request(PROMPT, max_tokens=8)))
        await held.begun.wait()
        await scene.decode.kill()
        names.answers["decode"] = [THIRD]
        again = ScriptedDecode("d1")
        await start(scene, again, scene.decode, THIRD)
        collected = await running
        assert collected.token_ids == {0: expected_tokens(PROMPT, 8)}
        assert collected.last.receipt.decode_workers == ["d0#1", "d1#1"]
        await forgotten(scene, scene.decode)


async def test_nothing_is_kept_of_those_that_went() -> None:
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        await scene.collect(request(PROMPT))
        await scene.idle()
        workers = scene.gateway.workers
        more: list[ScriptedWorker] = []
        for address in (SECOND, THIRD, FOURTH):
            prefill, decode = ScriptedPrefill(f"p{address}"), ScriptedDecode(f"d{address}")
            await start(scene, prefill, scene.prefill, address)
            await start(scene, decode, scene.decode, address)
            more += [prefill, decode]
        names.answer([FIRST, SECOND, THIRD, FOURTH])
        await scene.alive(*more)
        watching = [task for worker, task in workers._tasks.items() if worker.worker_id not in ("d0#1", "p0#1")]
        await asyncio.gather(*(scene.collect(request([70 + i] * 9)) for i in range(16)))
        assert 'worker="d127.0.0.3#1"' in scene.metrics.render().decode()
        names.answer([FIRST])
        for worker in more:
            await forgotten(scene, worker)
            await worker.idle()
        assert len(workers._all) == len(workers._tasks) == 2
        assert workers._pairs._pairs.keys() == {("d0#1", "p0#1")}
        for router in workers._routers.values():
            assert {*router._chosen, *router._holders.values()} <= {"d0#1", "p0#1"}
        assert "127.0.0." not in scene.metrics.render().decode()
        await asyncio.wait(watching)
        assert len(watching) == 6
        assert (await scene.collect(request(PROMPT))).token_ids == {0: expected_tokens(PROMPT, 6)}


async def test_a_worker_that_goes_away_has_its_name_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_UP_S", 3600)
    names = Names(prefill=[FIRST], decode=[FIRST, SECOND])
    async with named(names, decode=2) as scene:
        await scene.alive(*scene.decodes)
        names.answers["decode"] = [SECOND]
        await scene.decode.kill()
        await forgotten(scene, scene.decode)


async def test_a_resolver_that_fails_takes_no_worker_away() -> None:
    names = Names(prefill=[FIRST], decode=[FIRST])
    async with named(names) as scene:
        for answer in (socket.gaierror(-3, "Temporary failure"), [], KeyError("a bug"), ["no address"]):
            names.answer(answer)
            await names.answered()
            assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d0#1"]


# -- who counts once ---------------------------------------------------------------------------------------------------


async def test_an_address_by_two_names_counts_once() -> None:
    port = free_port()
    names = Names(prefill=[FIRST], decode=[FIRST], same=[FIRST])
    lists = {"decode_workers": (f"decode:{port}", f"same:{port}", f"{FIRST}:{port}")}

    def prepare(scene: Scene) -> None:
        scene.decode.target = f"{FIRST}:{port}"

    async with named(names, prepare=prepare, **lists) as scene:
        decodes = [worker for worker in scene.gateway.workers._all if worker.role == DECODE]
        assert [worker.target for worker in decodes] == [scene.decode.target]
        names.answer([SECOND])
        await names.answered()
        # the address itself is listed still, and the other one is no second worker by its second name
        decodes = [worker for worker in scene.gateway.workers._all if worker.role == DECODE]
        assert [worker.target for worker in decodes] == [f"{FIRST}:{port}", f"{SECOND}:{port}"]
        assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d0#1"]


async def test_a_process_at_two_addresses_counts_once() -> None:
    """As a container of a network with IPv4 and IPv6 has them."""
    names = Names(prefill=[FIRST], decode=[FIRST, SECOND])

    def prepare(scene: Scene) -> None:
        scene.decodes[1].info = {"worker_id": "d0#1"}

    async with named(names, decode=2, prepare=prepare) as scene:
        workers = scene.gateway.workers
        while not any(worker.twin for worker in workers._all):
            await workers.changes.next()
        [used] = workers.usable(DECODE)
        assert [worker.twin for worker in workers._all if worker.twin] == [used]
        assert scene.metrics.render().decode().count("tandem_worker_up{") == 2
        gone, left = scene.decodes if used.target == scene.decode.target else reversed(scene.decodes)
        await gone.kill()
        while [worker.target for worker in workers.usable(DECODE)] != [left.target]:
            await workers.changes.next()
        assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d0#1"]


async def test_ipv6() -> None:
    port = free_port()

    def prepare(scene: Scene) -> None:
        scene.decode.target = f"[::1]:{port}"

    names = Names(prefill=[FIRST], decode=["::1"])
    async with named(names, prepare=prepare, decode_workers=(f"decode:{port}",)) as scene:
        assert str(known(scene, scene.decode)) == f"decode worker decode:{port} at ::1 (d0#1)"
        assert (await scene.collect(request(PROMPT))).last.receipt.decode_workers == ["d0#1"]


# -- the start ---------------------------------------------------------------------------------------------------------


async def test_the_start_waits_for_every_entry(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.workers._REMIND_S", 0.0)
    caplog.set_level("INFO")
    unknown = socket.gaierror(-2, "Name or service not known")
    names = Names(prefill=[FIRST], decode=unknown)
    prefill, decode = ScriptedPrefill("p0"), ScriptedDecode("d0")
    prefill.target, decode.target = f"{FIRST}:{free_port()}", f"{SECOND}:{free_port()}"
    lists = {
        "prefill_workers": (f"prefill:{prefill.target.rpartition(':')[2]}",),
        "decode_workers": (f"decode:{decode.target.rpartition(':')[2]}",),
    }
    config = TandemConfig(served_name="scripted", gateway=lists)  # type: ignore[arg-type]
    await prefill.start()
    async with Workers(config, model(), Metrics(), names) as workers:
        starting = asyncio.create_task(workers.ready())
        while not workers.usable(PREFILL):
            await workers.changes.next()
        while "waiting for decode worker decode:" not in caplog.text:
            await workers.changes.next(timeout_s=0.05)
        assert f"waiting for decode worker {lists['decode_workers'][0]} (its name does not resolve: " in caplog.text
        # of two addresses one is enough
        names.answers["decode"] = [SECOND, THIRD]
        await names.answered()
        assert not starting.done()
        await decode.start()
        await starting
    await prefill.kill()
    await decode.kill()


async def test_the_error_names_the_entry_and_the_address() -> None:
    def prepare(scene: Scene) -> None:
        scene.decode.info = {"model": "another"}

    with pytest.raises(StartError, match=rf"^decode worker decode:\d+ at {FIRST}: model: the gateway serves"):
        async with named(Names(prefill=[FIRST], decode=[FIRST]), prepare=prepare):
            pass


async def test_no_worker_at_all() -> None:
    names = Names(decode=socket.gaierror(-2, "Name or service not known"))
    lists = {"prefill_workers": (), "decode_workers": ("decode:1",)}
    config = TandemConfig(served_name="scripted", gateway=lists)  # type: ignore[arg-type]
    before = len(asyncio.all_tasks())
    async with Gateway(config, model(), Metrics(), names) as gateway:
        await names.answered()
        assert not gateway.serving
        with pytest.raises(RpcError, match="no worker is alive") as error:
            async for _ in gateway.generate(request(PROMPT)):
                pass
        assert error.value.code == grpc.StatusCode.UNAVAILABLE
    assert len(asyncio.all_tasks()) == before
