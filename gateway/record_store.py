"""The records of requests that clients may come back to: by retry with the same request_id, or by Resume.

A record outlives its last reader by a window: a request still running is then cancelled, one that is done forgotten.
One that failed is forgotten at once, so that a retry runs anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from tandem.v1 import inference_pb2

from gateway.record import Record
from shared.rpc import exhausted, invalid, not_found

Key = tuple[str, str]  # who sent the request, its request_id: ids of one client mean nothing to another


@dataclass
class _Entry:
    record: Record
    fingerprint: bytes
    task: asyncio.Task[None]
    readers: int = 0
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class RecordStore:
    """Records by key. window_s: how long one outlives its last reader. max_records: how many are kept."""

    def __init__(self, window_s: float, max_records: int = 4096) -> None:
        self._window_s, self._max_records = window_s, max_records
        self._entries: dict[Key, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Key, fingerprint: bytes) -> tuple[Record, asyncio.Task[None]] | None:
        """The record of the same request, and the task that fills it.

        Raises INVALID_ARGUMENT if the id is another request's.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.fingerprint != fingerprint:
            raise invalid("request_id", f"{key[1]!r} is in use by a request that differs from this one")
        return entry.record, entry.task

    def make_room(self) -> None:
        """For one more record. Raises RESOURCE_EXHAUSTED if there are too many that are in use."""
        if len(self._entries) < self._max_records:
            return
        for key, entry in self._entries.items():
            if entry.record.ended and not entry.readers:
                self._forget(key)
                return
        raise exhausted(f"{len(self._entries)} requests with a request_id are in use, as many as this gateway keeps")

    def add(self, key: Key, fingerprint: bytes, record: Record, task: asyncio.Task[None]) -> None:
        """Keeps a new record. task: fills it, and is cancelled when nobody comes back for it."""
        self._entries[key] = _Entry(record, fingerprint, task)

    async def read(
        self, key: Key, positions: Callable[[Record], Mapping[int, int]] | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """A record's stream from given positions on. Raises NOT_FOUND if there is no such record."""
        entry = self._entries.get(key)
        if entry is None:
            raise not_found("request", key[1], f"no request {key[1]!r} is running or was kept")
        entry.readers += 1
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        try:
            async with aclosing(entry.record.read(positions(entry.record) if positions else None)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            entry.readers -= 1
            self._settle(key, entry)

    def ended(self, key: Key) -> None:
        """The request of a record is over."""
        entry = self._entries.get(key)
        if entry is not None:
            self._settle(key, entry)

    def close(self) -> None:
        """Forgets everything; running requests are their owner's to cancel."""
        for entry in self._entries.values():
            if entry.timer is not None:
                entry.timer.cancel()
        self._entries.clear()

    def _settle(self, key: Key, entry: _Entry) -> None:
        if self._entries.get(key) is not entry:
            return
        if entry.record.error is not None:
            self._forget(key)
        elif not entry.readers:
            if entry.timer is not None:
                entry.timer.cancel()
            entry.timer = asyncio.get_running_loop().call_later(self._window_s, self._expire, key)

    def _expire(self, key: Key) -> None:
        entry = self._entries[key]
        self._forget(key)
        if not entry.record.ended:
            entry.task.cancel()

    def _forget(self, key: Key) -> None:
        entry = self._entries.pop(key)
        if entry.timer is not None:
            entry.timer.cancel()
