"""One handoff of a request, on decode's side: copies what is announced, in order, while the prefill still runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.v1 import kv_pb2, types_pb2

from decode_worker.group import Reserved
from shared.transport.importer import CopyResult, Importer


class ImportAttempt:
    """Copies extents into a request's blocks until it is told that no more come, or cancelled.

    number: of the attempt. reserved: the request's blocks, once it has them.
    """

    def __init__(self, number: int, importer: Importer, reserved: asyncio.Future[Reserved], held_tokens: int) -> None:
        self.number = number
        self.covered_tokens = held_tokens  # leading tokens that are held or announced
        self.begun = False  # no more extents follow
        self.num_bytes = 0
        self.seconds = 0.0
        self.transport = types_pb2.TRANSPORT_UNSPECIFIED
        self.refusals: tuple[types_pb2.TransportRefusal, ...] = ()
        self._importer = importer
        self._reserved = reserved
        self._held_tokens = held_tokens
        self._extents: asyncio.Queue[kv_pb2.KvExtent | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self, done: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """done: called when everything is copied and `finish` was called. failed: called when a copy fails."""
        self._task = asyncio.create_task(self._run(done, failed))

    def add(self, extent: kv_pb2.KvExtent) -> None:
        """The extent's tokens follow on those before, some of which it may have too."""
        self.covered_tokens = extent.first_token + extent.num_tokens
        self._extents.put_nowait(extent)

    def finish(self) -> None:
        """No more extents follow."""
        self.begun = True
        self._extents.put_nowait(None)

    async def cancel(self) -> None:
        """Ends the attempt; no byte is written after this returns."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, done: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        try:
            reserved = await asyncio.shield(self._reserved)
            last: kv_pb2.KvExtent | None = None
            while (extent := await self._extents.get()) is not None:
                result = await self._importer.copy(extent, reserved.blocks, self._held_tokens, mark=reserved.mark)
                self._note(result)
                last = extent
            if last is not None:
                # were the export over already, its blocks might have been filled anew under the copy
                await self._importer.confirm(last)
        except Exception as error:
            failed(error)
        else:
            done()

    def _note(self, result: CopyResult) -> None:
        self.num_bytes += result.num_bytes
        self.seconds += result.seconds
        self.transport, self.refusals = result.transport, result.refusals
