"""The decode side of the KV handoff: copies exported blocks into this worker's pool.

    importer = Importer(layout, memory.buffer, worker_id=..., config=config.transport)
    pair = await importer.connect("10.0.0.1:50061")  # ahead of traffic; `copy` connects by itself too
    result = await importer.copy(extent, blocks)

All methods belong to one event loop; the bytes move on threads of the importer's own.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import grpc
import numpy as np
from pydantic import SecretStr
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared.config import TransportConfig
from shared.rpc import from_grpc, mismatch, stale, unavailable
from shared.transport.block_copy import copy_blocks, runs
from shared.transport.mapping import Mapping
from shared.transport.pair import Pair, shake_hands
from shared.transport.wire import CHUNK_BYTES, check_blocks, check_endpoint, check_extent

if TYPE_CHECKING:
    from shared.kv_cache import KvLayout

COPY_THREADS = 2
CONFIRM_TIMEOUT_S = 10.0
MAX_PAIRS = 256


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What an import cost."""

    num_bytes: int
    seconds: float  # in the copy itself, from its start to the last byte
    transport: types_pb2.Transport.ValueType


class Importer:
    """Copies blocks of other workers' pools into `buffer`, this worker's pool: writable, whole blocks of the layout."""

    def __init__(
        self,
        layout: KvLayout,
        buffer: memoryview | bytearray,
        *,
        worker_id: str,
        config: TransportConfig,
        key: SecretStr | None = None,
    ) -> None:
        """key: the cluster's, if prefill workers ask for one."""
        self._layout = layout
        self._bytes = np.frombuffer(buffer, dtype=np.uint8)  # keeps the buffer in place
        self._view = memoryview(buffer).cast("B")
        self._address = self._bytes.ctypes.data
        self.num_blocks = self._bytes.size // layout.block_bytes
        self._worker_id = worker_id
        self._config = config
        self._key = key
        self._threads = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-copy")
        self._pairs: dict[str, Pair] = {}  # by endpoint, the least recently made first
        self._retired: set[Pair] = set()
        self._connecting: dict[str, asyncio.Task[Pair]] = {}
        self._closed = False

    def pairs(self) -> list[Pair]:
        """The prefill workers shaken hands with and not known to be gone."""
        return list(self._pairs.values())

    async def connect(self, kv_endpoint: str) -> Pair:
        """Shakes hands with the prefill worker at host:port, and maps its pool if it can and has not yet.

        Raises FAILED_PRECONDITION naming the layout field that differs, or `transport.require` and why it cannot be
        met; UNAVAILABLE if nobody answers; INVALID_ARGUMENT for what is no host:port.
        """
        check_endpoint(kv_endpoint)
        if self._closed:
            raise unavailable("this worker is stopping")
        task = self._connecting.get(kv_endpoint)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._connect(kv_endpoint))
            self._connecting[kv_endpoint] = task
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # if all who wait are cancelled
        # shielded: others may wait for the same handshake, and a mapping half made must not be lost
        return await asyncio.shield(task)

    async def copy(self, extent: kv_pb2.KvExtent, dst_blocks: Sequence[int]) -> CopyResult:
        """Copies the extent's blocks, in order, into the blocks dst_blocks of this worker's pool.

        When this returns or raises, cancellation included, no byte will be written any more: only then may the caller
        free dst_blocks. Cancellation ends the copy within a piece (block_copy.py) or a chunk.
        Raises ABORTED if the pool's epoch or the export is over or the bytes fail their checksum (hand over again);
        UNAVAILABLE if the peer is gone; FAILED_PRECONDITION or INVALID_ARGUMENT for an extent that cannot be used;
        ValueError for wrong dst_blocks. After any of these dst_blocks hold anything.
        """
        self._check_destination(extent, dst_blocks)
        check_extent(extent, self._layout)
        pair = self._pairs.get(extent.kv_endpoint)
        if pair is None or pair.epoch != extent.epoch:
            pair = await self.connect(extent.kv_endpoint)
        if pair.epoch != extent.epoch:
            raise stale(f"the extent is of epoch {extent.epoch} of {extent.kv_endpoint}, which is at {pair.epoch}")
        check_blocks("extent.block_ids", extent.block_ids, pair.num_blocks)
        begin = time.perf_counter()
        with pair.in_use():
            if pair.mapping is not None:
                checksum = await self._copy_mapped(pair.mapping, extent, dst_blocks)
            else:
                checksum = await self._fetch(pair, extent, dst_blocks)
        if extent.HasField("crc32") and checksum != extent.crc32:
            raise stale(f"checksum {checksum:08x} of the copied blocks is not the extent's {extent.crc32:08x}")
        num_bytes = len(dst_blocks) * self._layout.block_bytes
        return CopyResult(num_bytes, time.perf_counter() - begin, pair.transport)

    async def confirm(self, extent: kv_pb2.KvExtent) -> None:
        """Raises ABORTED unless the extent's export is still open: only then is what was copied from it surely its own.

        A mapped pool shows no end of an export, after which its blocks may have been filled anew under the copy.
        Raises UNAVAILABLE if the peer is gone.
        """
        pair = self._pairs.get(extent.kv_endpoint)
        if pair is None or pair.epoch != extent.epoch:
            raise stale(f"epoch {extent.epoch} of the pool of {extent.kv_endpoint} is over")
        if pair.mapping is None:  # every chunk of Fetch was checked
            return
        request = kv_pb2.FetchRequest(export_id=extent.export_id, epoch=extent.epoch)
        with pair.in_use():
            try:
                async for _ in kv_pb2_grpc.KvServiceStub(pair.channel).Fetch(request, timeout=CONFIRM_TIMEOUT_S):
                    pass
            except grpc.aio.AioRpcError as error:
                raise from_grpc(error) from None

    async def close(self) -> None:
        """Ends every pair: unmaps pools and closes channels, once the copies that run are done.

        A copy whose peer hangs ends only when it is cancelled, which is its caller's to do first.
        """
        self._closed = True
        await asyncio.gather(*self._connecting.values(), return_exceptions=True)
        for pair in self.pairs():
            self._drop(pair)
        await asyncio.gather(*(pair.closed.wait() for pair in self._retired))
        self._threads.shutdown()
        self._view.release()
        self._bytes = np.empty(0, dtype=np.uint8)

    async def _connect(self, kv_endpoint: str) -> Pair:
        try:
            pair = await shake_hands(kv_endpoint, self._layout, self._worker_id, self._config, self._key)
            current = self._pairs.get(kv_endpoint)
            if current is not None and (current.epoch, current.transport) == (pair.epoch, pair.transport):
                self._retire(pair)
                return current
            if current is not None:
                self._drop(current)
            self._pairs[kv_endpoint] = pair
            if pair.mapping is not None:
                # a dead worker's pool would otherwise stay in memory for as long as it is mapped here
                pair.mapping.watch(lambda: self._drop(pair))
            while len(self._pairs) > MAX_PAIRS:
                self._drop(next(iter(self._pairs.values())))
            return pair
        finally:
            del self._connecting[kv_endpoint]

    def _drop(self, pair: Pair) -> None:
        if self._pairs.get(pair.kv_endpoint) is pair:
            del self._pairs[pair.kv_endpoint]
        self._retire(pair)

    def _retire(self, pair: Pair) -> None:
        self._retired = {p for p in self._retired if not p.closed.is_set()} | {pair}
        pair.retire()

    def _check_destination(self, extent: kv_pb2.KvExtent, dst_blocks: Sequence[int]) -> None:
        if len(dst_blocks) != len(extent.block_ids) or len(set(dst_blocks)) != len(dst_blocks):
            raise ValueError(f"{len(extent.block_ids)} blocks cannot go to {list(dst_blocks)}")
        if not all(0 < block < self.num_blocks for block in dst_blocks):
            raise ValueError(f"{list(dst_blocks)} are not all in 1..{self.num_blocks - 1}")

    async def _copy_mapped(self, mapping: Mapping, extent: kv_pb2.KvExtent, dst_blocks: Sequence[int]) -> int:
        stop = Event()
        source, destination = list(extent.block_ids), list(dst_blocks)

        def work() -> int:
            copied = copy_blocks(mapping.address, self._address, self._layout.block_bytes, source, destination, stop)
            return self._checksum(destination) if copied and extent.HasField("crc32") else 0

        # Not awaited directly: cancelling such a future marks it done while its thread still writes.
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
                stop.set()
        if cancelled is not None:
            raise cancelled
        return future.result()

    def _checksum(self, blocks: Sequence[int]) -> int:
        size = self._layout.block_bytes
        checksum = 0
        for first, _, count in runs(blocks, range(len(blocks))):
            checksum = zlib.crc32(self._view[first * size : (first + count) * size], checksum)
        return checksum

    async def _fetch(self, pair: Pair, extent: kv_pb2.KvExtent, dst_blocks: Sequence[int]) -> int:
        size = self._layout.block_bytes
        # the places that the stream fills, in order
        places = [
            self._view[first * size : (first + count) * size]
            for _, first, count in runs(range(len(dst_blocks)), dst_blocks)
        ]
        places.reverse()
        missing = len(dst_blocks) * size
        checksum = 0
        request = kv_pb2.FetchRequest(export_id=extent.export_id, epoch=extent.epoch, block_ids=extent.block_ids)
        call = kv_pb2_grpc.KvServiceStub(pair.channel).Fetch(request)
        try:
            async for response in call:
                data = memoryview(response.data)
                missing -= len(data)
                if missing < 0 or len(data) > CHUNK_BYTES:
                    raise mismatch("fetch", f"{pair.kv_endpoint} sends more bytes than were asked for")
                if extent.HasField("crc32"):
                    checksum = zlib.crc32(data, checksum)
                while data:
                    # written here on the event loop: once this coroutine has ended nothing can write any more
                    count = min(len(data), len(places[-1]))
                    places[-1][:count] = data[:count]
                    data, places[-1] = data[count:], places[-1][count:]
                    if not places[-1]:
                        places.pop()
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                self._drop(pair)  # the next attempt gets a channel that waits for no backoff
            raise from_grpc(error) from None
        finally:
            call.cancel()
        if missing:
            raise mismatch("fetch", f"{pair.kv_endpoint} sent {missing} bytes less than were asked for")
        return checksum
