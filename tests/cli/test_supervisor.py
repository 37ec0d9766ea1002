"""The supervisor's own rules, over small processes that do as they are told."""

import asyncio
import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from cli.process import StartError
from cli.supervisor import Role, Supervisor

FAKE = Path(__file__).with_name("fake_role.py")


class Lines(list[tuple[str, str]]):
    """What the members said; `of` waits for nothing, `until` for a line."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def __call__(self, name: str, line: str) -> None:
        self.append((name, line))
        self._changed.set()

    async def until(self, name: str, part: str) -> str:
        async with asyncio.timeout(20):
            while True:
                self._changed.clear()
                for who, line in self:
                    if who == name and part in line:
                        return line
                await self._changed.wait()

    def settings(self, name: str) -> dict[str, str]:
        """Those of the member's last start."""
        return [json.loads(line.removeprefix("settings ")) for who, line in self if who == name and "settings" in line][
            -1
        ]


def command(role: Role) -> list[str]:
    return [sys.executable, str(FAKE), role]


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
async def supervisor(lines: Lines):
    async with Supervisor(on_line=lines, command=command, settings={"dtype": "float32"}, grace_s=10) as supervisor:
        yield supervisor


def gone(pid: int) -> bool:
    """Whether the process is gone, or goes within seconds: a signal sent is not yet an end."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 5)[0])
    finally:
        os.close(handle)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


async def test_starts_each_role_and_tells_the_gateway_of_the_workers(supervisor, lines):
    prefill = await supervisor.start("prefill_worker", {"prefill.port": 0})
    decode = [await supervisor.start("decode_worker", {"decode.max_running": n}) for n in (1, 2)]
    gateway = await supervisor.start("gateway")
    settings = lines.settings(gateway.name)
    assert json.loads(settings["gateway.prefill_workers"]) == [prefill.grpc]
    assert json.loads(settings["gateway.decode_workers"]) == [member.grpc for member in decode]
    assert settings["dtype"] == '"float32"'
    assert [lines.settings(member.name)["decode.max_running"] for member in decode] == ["1", "2"]
    assert [member.name for member in supervisor.members] == ["prefill-0", "decode-0", "decode-1", "gateway-0"]


async def test_stop_ends_the_gateway_first_and_leaves_nothing(supervisor, lines):
    members = [await supervisor.start(role) for role in ("prefill_worker", "decode_worker", "gateway")]
    processes = [member.process for member in members]
    ends: list[str] = []
    waits = [asyncio.create_task(process.wait()) for process in processes]
    for member, wait in zip(members, waits, strict=True):
        wait.add_done_callback(lambda _, name=member.name: ends.append(name))
    await supervisor.stop()
    assert await asyncio.gather(*waits) == [0, 0, 0]
    assert ends[0] == "gateway-0"
    assert all(gone(process.pid) for process in processes)
    assert supervisor.members == []


async def test_death_at_start_tells_the_last_lines(supervisor):
    with pytest.raises(StartError, match=r"prefill-0 ended with status 3 before it was ready(?s:.*)cannot go on"):
        await supervisor.start("prefill_worker", {"fake": "die"})
    assert supervisor.members == []


async def test_silence_at_start_is_an_error_and_leaves_nothing(lines):
    async with Supervisor(on_line=lines, command=command, ready_s=1) as supervisor:
        with pytest.raises(StartError, match="was not ready after 1 s"):
            await supervisor.start("decode_worker", {"fake": "silent"})


async def test_cancelled_start_leaves_nothing(supervisor, lines):
    before = set(children())
    start = asyncio.create_task(supervisor.start("decode_worker", {"fake": "silent"}))
    await lines.until("decode-0", "hello")
    assert len(set(children()) - before) == 1
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert set(children()) <= before


async def test_killed_member_stays_down_and_restarts_on_its_ports(supervisor, lines):
    gateway = await supervisor.start("gateway", {"gateway.decode_workers": ["x:1"]})
    address, pid = gateway.grpc, gateway.pid
    await gateway.kill()
    assert not gateway.alive
    assert gone(pid)
    await gateway.restart({"gateway.max_queued": 3})
    assert gateway.alive
    assert gateway.pid != pid
    assert gateway.grpc == address
    assert lines.settings("gateway-0")["gateway.max_queued"] == "3"
    assert json.loads(lines.settings("gateway-0")["gateway.decode_workers"]) == ["x:1"]


async def test_revived_member_comes_back_on_its_port(supervisor, lines):
    member = await supervisor.start("decode_worker", revive=True)
    address, pid = member.grpc, member.pid
    await member.kill()
    await lines.until("decode-0", "ended with SIGKILL")
    await lines.until("decode-0", "is back")
    assert member.restarts == 1
    assert member.alive
    assert member.pid != pid
    assert member.grpc == address


async def test_stop_while_a_member_fails_to_come_back(supervisor, lines):
    member = await supervisor.start("decode_worker", revive=True)
    member.settings["fake"] = "die"
    await member.kill()
    await lines.until("decode-0", "another try")
    await supervisor.stop()
    assert not member.alive


async def test_a_process_that_ignores_sigterm_is_killed(lines):
    async with Supervisor(on_line=lines, command=command, grace_s=0.2) as supervisor:
        member = await supervisor.start("decode_worker", {"fake": "stubborn"})
        assert await member.stop() == -signal.SIGKILL


async def test_grandchildren_end_with_their_parent(supervisor, lines):
    member = await supervisor.start("decode_worker", {"fake": "grandchild"})
    grandchild = int((await lines.until("decode-0", "grandchild ")).split()[1])
    await member.stop()
    assert gone(grandchild)
