"""Where a worker's load is put up, and whether it admits requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from tandem.v1 import worker_pb2

from shared.engine_thread import Load
from shared.rpc import unavailable


class LoadBoard:
    """The newest load, with watchers, and the streams that are open. One event loop."""

    def __init__(self) -> None:
        self._load = Load()
        self._streams = 0
        self._draining = False
        self._watchers: set[asyncio.Event] = set()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def running(self) -> int:
        """Streams that hold, or wait for, something here."""
        return self._streams

    def publish(self, load: Load) -> None:
        self._load = load
        self._notify()

    def drain(self) -> None:
        """From now on no request is admitted."""
        self._draining = True
        self._notify()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Around a request's stream. Raises UNAVAILABLE while draining."""
        if self._draining:
            raise unavailable("the worker is draining; another one takes new requests")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._notify()

    async def watch(self, interval_s: float) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        """The load at once, then whenever it changes, at most every `interval_s` seconds."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield worker_pb2.WatchLoadResponse(
                    **self._load._asdict(), draining=self._draining, tasks=len(asyncio.all_tasks())
                )
                await asyncio.sleep(interval_s)
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    async def idle(self) -> None:
        """Returns once no stream is open."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while self._streams:
                changed.clear()
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _notify(self) -> None:
        for watcher in self._watchers:
            watcher.set()
