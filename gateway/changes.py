"""Wakes everyone who waits for something to change."""

from __future__ import annotations

import asyncio


class Changes:
    """Look at the state, then `await changes.next()`: with no await between the two, no announcement is missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def announce(self) -> None:
        """Wakes those who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def next(self, timeout_s: float | None = None) -> None:
        """Returns at the next announcement, or after so many seconds."""
        event = self._event
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass
