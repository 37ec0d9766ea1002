"""The thread that an engine runs on. It never waits on gRPC, and gRPC never waits on it.

Commands come in through `post`; what a step brings goes back to the event loop in one batch per turn. The loop is woken
when the next step computes, or when there is none: woken before, it would hold Python's lock while that is prepared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from kernels.cpu import library

log = logging.getLogger(__name__)

# An idle thread turns this often, so that its heartbeat tells it from a wedged one.
IDLE_TURN_S = 0.5


class Load(NamedTuple):
    """A scheduler's load, as `WatchLoadResponse` has it."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    queued_tokens: int = 0
    steps: int = 0
    exports: int = 0
    allocated_blocks: int = 0


class Scheduler(Protocol):
    """What a worker's engine thread drives. Everything here is called on that thread."""

    def prepare(self) -> None:
        """Called once, before the first step."""
        ...

    def step(self) -> bool:
        """Does one step of work; False when there is nothing to do until the next command."""
        ...

    @property
    def pause_s(self) -> float:
        """How long the next step of a busy scheduler is to wait, from the end of the last on; commands do not."""
        ...

    def load(self) -> Load: ...

    def take_events(self) -> list[tuple[Callable[[Any], None], Any]]:
        """What has happened since the last call: receivers, each with what it gets on the event loop."""
        ...


class EngineThread:
    """Runs a scheduler until stopped. Create and stop it on the event loop that its events go to.

    on_load: gets each new load. on_failure: gets an exception that left the scheduler in an unknown state; the thread
    has ended then.
    """

    def __init__(
        self, scheduler: Scheduler, *, on_load: Callable[[Load], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._scheduler = scheduler
        self._on_load = on_load
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._outgoing: deque[tuple[list[tuple[Callable[[Any], None], Any]], Load | None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._bell, self._receive)
        self._stopped = False
        self._turned_s = time.monotonic()
        self._load = Load()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Tells the load that there is to begin with, and starts."""
        self._load = self._scheduler.load()
        self._on_load(self._load)
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Has a command run on the thread before its next step. From any thread."""
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    @property
    def silent_s(self) -> float:
        """Seconds since the loop last turned; below IDLE_TURN_S and the time of a step unless it is wedged or dead."""
        return time.monotonic() - self._turned_s

    async def stop(self) -> None:
        """Ends the thread after its current step, waits for that, and hands over what it brought. Call it once."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._receive()
        self._loop.remove_reader(self._bell)
        os.close(self._bell)

    def _run(self) -> None:
        try:
            self._scheduler.prepare()
            busy, next_s = False, 0.0
            while True:
                with self._wake:
                    wait_s = next_s - time.monotonic() if busy else IDLE_TURN_S
                    if not self._inbox and wait_s > 0 and not self._stopped:
                        self._ring_later(None)
                        self._wake.wait(wait_s)
                    if self._stopped:
                        return
                    commands, self._inbox = self._inbox, []
                self._turned_s = time.monotonic()
                for command in commands:
                    command()
                if not busy or time.monotonic() >= next_s:
                    busy = self._scheduler.step()
                    next_s = time.monotonic() + self._scheduler.pause_s
                self._hand_over()
        except BaseException as error:
            log.critical("the engine thread failed", exc_info=error)
            self._outgoing.append(([(self._on_failure, error)], None))
            self._ring_later(self._bell)
        finally:
            self._ring_later(None)

    def _hand_over(self) -> None:
        events = self._scheduler.take_events()
        load = self._scheduler.load()
        changed = load != self._load
        self._load = load
        if events or changed:
            self._outgoing.append((events, load if changed else None))
            self._ring_later(self._bell)

    @staticmethod
    def _ring_later(bell: int | None) -> None:
        """Has the loop woken by this thread's next op; what was to be rung before is rung now."""
        library.call("tandem_ring_later", -1 if bell is None else bell)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._outgoing:
            events, load = self._outgoing.popleft()
            for receiver, event in events:
                receiver(event)
            if load is not None:
                self._on_load(load)
