"""The streams of several requests as one, read ahead so that whatever is ready can be handled at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from tandem.v1 import inference_pb2

Reply = inference_pb2.GenerateResponse
# Replies read ahead; a client that reads slower than its tokens come then slows its own requests only.
_READ_AHEAD = 256


class MergedStream:
    """Reads all streams at once. Leaving it closes each, which cancels the requests that still run.

    async with MergedStream(streams) as merged:
        while batch := await merged.ready():
            for request, reply in batch: ...
    """

    def __init__(self, streams: Sequence[AsyncGenerator[Reply, None]]) -> None:
        self._queue: asyncio.Queue[tuple[int, Reply | Exception | None]] = asyncio.Queue(_READ_AHEAD)
        self._readers = [asyncio.create_task(self._read(i, stream)) for i, stream in enumerate(streams)]
        self._unfinished = len(self._readers)
        self._failure: Exception | None = None

    async def ready(self) -> list[tuple[int, Reply]]:
        """Every reply that waits, with its request's number; waits for one. Empty when all streams have ended.

        Raises the first failure of any stream, after the replies that came before it.
        """
        batch: list[tuple[int, Reply]] = []
        while self._failure is None and (self._unfinished or not self._queue.empty()):
            if batch and self._queue.empty():
                break
            request, item = await self._queue.get()
            if item is None:
                self._unfinished -= 1
            elif isinstance(item, Exception):
                self._failure = item
            else:
                batch.append((request, item))
        if not batch and self._failure is not None:
            raise self._failure
        return batch

    async def _read(self, request: int, stream: AsyncGenerator[Reply, None]) -> None:
        try:
            async with aclosing(stream):
                async for reply in stream:
                    await self._queue.put((request, reply))
        except Exception as error:
            await self._queue.put((request, error))
        else:
            await self._queue.put((request, None))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
