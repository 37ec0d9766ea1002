from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from shared.engine_thread import EngineThread, Load


class Counter:
    """A scheduler with a number of steps to do."""

    pause_s = 0.0

    def __init__(self, receive: Callable[[Any], None] = lambda event: None) -> None:
        self.left = 0
        self.done = 0
        self.receive = receive
        self.prepared_on: threading.Thread | None = None
        self.events: list[Any] = []

    def prepare(self) -> None:
        self.prepared_on = threading.current_thread()

    def add(self, steps: int) -> None:
        self.left += steps

    def step(self) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.done += 1
        self.events += [self.done, -self.done]
        return True

    def load(self) -> Load:
        return Load(steps=self.done)

    def take_events(self) -> list[tuple[Callable[[Any], None], Any]]:
        events, self.events = self.events, []
        return [(self.receive, event) for event in events]


async def test_commands_run_on_the_thread_and_events_come_back_in_order() -> None:
    received: list[int] = []
    receiving: set[threading.Thread] = set()
    finished = asyncio.Event()

    def receive(event: int) -> None:
        received.append(event)
        receiving.add(threading.current_thread())
        if event == -20:
            finished.set()

    scheduler = Counter(receive)
    loads: list[Load] = []
    thread = EngineThread(scheduler, on_load=loads.append, on_failure=lambda error: None)
    thread.start()
    assert loads == [Load()], "told before anything has happened"
    thread.post(lambda: scheduler.add(20))
    async with asyncio.timeout(10):
        await finished.wait()
    await thread.stop()
    assert received == [sign * n for n in range(1, 21) for sign in (1, -1)]
    assert receiving == {threading.current_thread()}
    assert scheduler.prepared_on is not threading.current_thread()
    assert loads[-1] == Load(steps=20)
    assert loads == sorted(loads, key=lambda load: load.steps)


async def test_a_wedged_step_shows_in_the_heartbeat() -> None:
    entered, release = threading.Event(), threading.Event()

    def wedge() -> None:
        entered.set()
        release.wait()

    turned = threading.Event()
    thread = EngineThread(Counter(), on_load=lambda load: None, on_failure=lambda error: None)
    thread.start()
    thread.post(wedge)
    await asyncio.to_thread(entered.wait)
    silences = [thread.silent_s for _ in range(3)]
    assert silences == sorted(set(silences))
    released_s = time.monotonic()
    thread.post(turned.set)
    release.set()
    await asyncio.to_thread(turned.wait)
    assert thread.silent_s < time.monotonic() - released_s
    await thread.stop()


async def test_an_exception_ends_the_thread_and_is_told() -> None:
    failures: list[BaseException] = []
    failed = asyncio.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    def broken() -> None:
        raise RuntimeError("state unknown")

    thread = EngineThread(Counter(), on_load=lambda load: None, on_failure=on_failure)
    thread.start()
    thread.post(broken)
    async with asyncio.timeout(10):
        await failed.wait()
    await thread.stop()
    with pytest.raises(RuntimeError, match="state unknown"):
        raise failures[0]


async def test_a_pause_holds_up_steps_and_no_command() -> None:
    scheduler = Counter()
    scheduler.pause_s = 60.0
    thread = EngineThread(scheduler, on_load=lambda load: None, on_failure=lambda error: None)
    thread.start()
    thread.post(lambda: scheduler.add(2))
    heard = [asyncio.Event() for _ in range(3)]
    loop = asyncio.get_running_loop()
    for event in heard:
        thread.post(lambda event=event: loop.call_soon_threadsafe(event.set))
        await event.wait()
    assert scheduler.done == 1
    await thread.stop()
    assert scheduler.left == 1
