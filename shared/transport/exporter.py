"""The prefill side of the KV handoff: offers its pools to decode workers and serves KvService.

    exporter = Exporter([Pool(layout, memory)], worker_id=..., kv_endpoint="10.0.0.1:50061", config=config.transport)
    await exporter.start()
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    exporter.open_export("request-1/1", blocks)
    yield PrefillResponse(extent=await exporter.extent("request-1/1", blocks, first_token=0, num_tokens=100))
    exporter.close_export("request-1/1")  # before the blocks are freed

All methods belong to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import handler, invalid, mismatch, stale
from shared.transport.block_copy import runs
from shared.transport.cuda import CudaError
from shared.transport.descriptor_socket import DescriptorServer
from shared.transport.pool import Pool
from shared.transport.wire import (
    CHUNK_BYTES,
    CUDA_IPC,
    INLINE,
    SHARED_MEMORY,
    TRANSPORT_NAMES,
    TRANSPORTS,
    check_blocks,
    check_layouts,
    describe,
    host_id,
    layout_from_proto,
    layout_to_proto,
    refusal,
    requirement,
)

log = logging.getLogger(__name__)

RELEASE_S = 2.0


class Exporter(kv_pb2_grpc.KvServiceServicer):
    """Pools that decode workers copy from. `epoch` names this life of them: a restarted worker has another one.

    pools: one, or one for each rank; together they hold every head of the model, and a block has one number in all.
    kv_endpoint: host:port at which decode workers reach the server that this servicer is added to.
    Raises ValueError for pools that are none of one worker.
    """

    def __init__(self, pools: Sequence[Pool], *, worker_id: str, kv_endpoint: str, config: TransportConfig) -> None:
        self.epoch = secrets.randbits(63) | 1  # 0 is never an epoch
        self.num_blocks = pools[0].num_blocks
        if any(pool.num_blocks != self.num_blocks for pool in pools):
            raise ValueError(f"pools of {[pool.num_blocks for pool in pools]} blocks are none of one worker")
        self._pools = tuple(pools)
        self._layout = KvLayout.joined([pool.layout for pool in pools])
        self._layout_proto = layout_to_proto(self._layout)
        self._worker_id = worker_id
        self._kv_endpoint = kv_endpoint
        self._config = config
        self._exports: dict[str, set[int]] = {}
        self._sockets: list[DescriptorServer] = []
        # of each pool
        self._handles = {INLINE: [kv_pb2.KvHandle(inline=kv_pb2.InlineHandle(chunk_bytes=CHUNK_BYTES))] * len(pools)}
        self._refusals: dict[types_pb2.Transport.ValueType, str] = {}

    @property
    def num_exports(self) -> int:
        """Live exports."""
        return len(self._exports)

    async def start(self) -> None:
        """Makes the transports ready. Raises FAILED_PRECONDITION if that leaves none as good as `transport.require`."""
        for transport, prepare in ((CUDA_IPC, self._offer_cuda_ipc), (SHARED_MEMORY, self._offer_shared_memory)):
            if TRANSPORT_NAMES[transport] in self._config.disable:
                self._refusals[transport] = "the prefill worker's transport.disable names it"
                continue
            try:
                self._handles[transport] = [
                    prepare(pool, f".{number}" if number else "") for number, pool in enumerate(self._pools)
                ]
            except OSError as error:
                self._refusals[transport] = str(error)
        required = TRANSPORTS.get(self._config.require or "", INLINE)
        if max(self._handles) < required:
            self.close()
            raise requirement(str(self._config.require), [refusal(t, reason) for t, reason in self._refusals.items()])
        for transport in [t for t in self._handles if t < required]:
            del self._handles[transport]
            self._refusals[transport] = f"the prefill worker's transport.require is {self._config.require}"

    def _offer_shared_memory(self, pool: Pool, suffix: str) -> kv_pb2.KvHandle:
        memory = pool.memory
        handle = kv_pb2.SharedMemoryHandle(
            socket_path=self._listen(memory.read_only_fd(), memory.num_bytes, suffix),
            num_bytes=memory.num_bytes,
            staged=pool.device is not None,
        )
        return kv_pb2.KvHandle(shared_memory=handle)

    def _offer_cuda_ipc(self, pool: Pool, suffix: str) -> kv_pb2.KvHandle:
        device = pool.device
        if device is None:
            raise CudaError("the prefill worker's pool is not on a CUDA device")
        handle = kv_pb2.CudaIpcHandle(
            handle=device.handle,
            device_uuid=device.driver.uuid,
            num_bytes=device.size,
            event_handles=device.event_handles(),
        )
        handle.socket_path = self._listen(device.descriptor(), device.size, f"{suffix}.cuda")
        return kv_pb2.KvHandle(cuda_ipc=handle)

    def _listen(self, fd: int | None, num_bytes: int, suffix: str) -> str:
        server = DescriptorServer(fd, self.epoch, num_bytes, self._config.socket_dir, suffix=suffix)
        self._sockets.append(server)
        return str(server.path)

    async def release(self) -> None:
        """Has every process that maps a device's memory let go of it, within RELEASE_S: what a handle leads to must not
        be freed before. Nobody can map it any more."""
        if all(pool.device is None for pool in self._pools):
            return
        self._exports.clear()
        released = await asyncio.gather(*(server.release(RELEASE_S) for server in self._sockets))
        if not all(released):
            log.warning("a decode worker still has the pool mapped after %g s; it is freed nevertheless", RELEASE_S)

    def close(self) -> None:
        """Ends every export and the sockets. Processes that have mapped the pool keep what they have mapped."""
        self._exports.clear()
        for server in self._sockets:
            server.close()
        self._sockets.clear()

    def open_export(self, export_id: str, blocks: Sequence[int] = ()) -> None:
        """Lets `Fetch` read blocks until `close_export`. The caller holds a reference on each for as long.

        Raises ValueError if there is such an export, or a block is not in the pool.
        """
        if export_id in self._exports:
            raise ValueError(f"export {export_id!r} is open already")
        self._exports[export_id] = set()
        self.extend(export_id, blocks)

    def extend(self, export_id: str, blocks: Sequence[int]) -> None:
        """Adds blocks to an export. Raises ValueError if it is not open, or a block is not in the pool."""
        if export_id not in self._exports:
            raise ValueError(f"export {export_id!r} is not open")
        if not all(0 < block < self.num_blocks for block in blocks):
            raise ValueError(f"{list(blocks)} are not all in 1..{self.num_blocks - 1}")
        self._exports[export_id].update(blocks)

    def close_export(self, export_id: str) -> None:
        """Ends an export, if it is open: no byte of its blocks leaves after this by `Fetch`."""
        self._exports.pop(export_id, None)

    async def extent(
        self, export_id: str, block_ids: Sequence[int], first_token: int, num_tokens: int, mark: int = 0
    ) -> kv_pb2.KvExtent:
        """Announces blocks of an export.

        first_token: position in the history of the first block's first token. num_tokens: held by the blocks.
        mark: of the device, by which their content is there.
        With `transport.checksum` this reads the blocks (about 1 ms for a MiB).
        Raises ValueError if the export is not open or has not got the blocks, or the tokens do not take exactly them.
        """
        if not self._exports.get(export_id, set()).issuperset(block_ids):
            raise ValueError(f"export {export_id!r} does not hold all of {list(block_ids)}")
        if first_token % self._layout.block_tokens or -(-num_tokens // self._layout.block_tokens) != len(block_ids):
            raise ValueError(f"tokens {first_token}+{num_tokens} do not take exactly {len(block_ids)} whole blocks")
        extent = kv_pb2.KvExtent(
            kv_endpoint=self._kv_endpoint,
            epoch=self.epoch,
            layout_digest=self._layout_proto.digest,
            block_ids=block_ids,
            first_token=first_token,
            num_tokens=num_tokens,
            export_id=export_id,
            mark=mark,
        )
        if self._config.checksum:
            checksums = [await self._checksum(pool, block_ids, mark) for pool in self._pools]
            if len(checksums) == 1:
                extent.crc32 = checksums[0]
            else:
                extent.pool_crc32.extend(checksums)
        return extent

    @handler
    async def Handshake(
        self, request: kv_pb2.HandshakeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kv_pb2.HandshakeResponse:
        check_layouts(self._layout_proto, request.layout, converts_dtype=request.converts_dtype)
        layout_from_proto(request.layout)
        response = kv_pb2.HandshakeResponse(
            layout=self._layout_proto, worker_id=self._worker_id, epoch=self.epoch, num_blocks=self.num_blocks
        )
        offered: list[types_pb2.Transport.ValueType] = []
        for transport in sorted(set(request.transports), reverse=True):  # best first
            if reason := self._refusal(transport, request.host_id):
                response.refusals.append(refusal(transport, reason))
            else:
                offered.append(transport)
        if not offered:
            field = "transport.require" if self._config.require else "transports"
            raise mismatch(field, f"no transport is left: {describe(response.refusals)}")
        if len(self._pools) == 1:
            response.handles.extend(self._handles[transport][0] for transport in offered)
            return response
        for number, pool in enumerate(self._pools):
            handles = [self._handles[transport][number] for transport in offered]
            response.pools.append(kv_pb2.KvPool(layout=layout_to_proto(pool.layout), handles=handles))
        return response

    @handler
    async def Fetch(
        self, request: kv_pb2.FetchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kv_pb2.FetchResponse]:
        if request.epoch != self.epoch:
            raise stale(f"epoch {request.epoch} of the pool is over; it is {self.epoch} now")
        export = self._exports.get(request.export_id)
        self._check_open(request.export_id, export)
        if request.pool >= len(self._pools):
            raise invalid("pool", f"{request.pool} is none of {len(self._pools)}")
        pool = self._pools[request.pool]
        if not request.block_ids:
            await self._settle(pool, request.mark)
            return
        check_blocks("block_ids", request.block_ids, self.num_blocks)
        if export is not None and not export.issuperset(request.block_ids):
            raise invalid("block_ids", "not all of them belong to the export")
        await self._stage(pool, request.block_ids, request.mark)
        if request.stage:
            self._check_open(request.export_id, export)
            return
        pieces: list[memoryview] = []
        size = 0
        for piece in self._pieces(pool, request.block_ids):
            while piece:
                pieces.append(piece[: CHUNK_BYTES - size])
                size += len(pieces[-1])
                piece = piece[len(pieces[-1]) :]
                if size == CHUNK_BYTES:
                    yield self._chunk(request.export_id, export, pieces)
                    pieces, size = [], 0
        if pieces:
            yield self._chunk(request.export_id, export, pieces)

    def _refusal(self, transport: types_pb2.Transport.ValueType, peer_host_id: str) -> str | None:
        if transport not in TRANSPORT_NAMES:
            return "the prefill worker does not know it"
        if reason := self._refusals.get(transport):
            return reason
        if transport in (CUDA_IPC, SHARED_MEMORY) and peer_host_id != host_id():
            return "the workers run on different hosts"
        return None

    async def _settle(self, pool: Pool, mark: int) -> None:
        """Waits until the device has passed a mark."""
        if pool.device is not None:
            try:
                await asyncio.to_thread(pool.device.settle, mark)
            except ValueError as error:
                raise invalid("mark", str(error)) from None

    async def _stage(self, pool: Pool, block_ids: Sequence[int], mark: int) -> None:
        """Puts blocks of a pool on a device where `_pieces` and other processes read them."""
        if pool.device is None:
            return
        staging = pool.memory.tensor.view(self.num_blocks, -1)
        try:
            await asyncio.to_thread(pool.device.copy_out, list(block_ids), staging, mark)
        except ValueError as error:
            raise invalid("mark", str(error)) from None

    async def _checksum(self, pool: Pool, block_ids: Sequence[int], mark: int) -> int:
        """CRC-32 of a pool's blocks in order."""
        await self._stage(pool, block_ids, mark)
        checksum = 0
        for piece in self._pieces(pool, block_ids):
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def _chunk(self, export_id: str, export: set[int] | None, pieces: list[memoryview]) -> kv_pb2.FetchResponse:
        # looked up anew for each chunk: once the export is closed its blocks may hold another request's tokens
        self._check_open(export_id, export)
        return kv_pb2.FetchResponse(data=b"".join(pieces))

    def _check_open(self, export_id: str, export: set[int] | None) -> None:
        if export is None or self._exports.get(export_id) is not export:
            raise stale(f"export {export_id[:200]!r} has ended")

    @staticmethod
    def _pieces(pool: Pool, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of blocks, neighbours in one piece."""
        size = pool.layout.block_bytes
        buffer = pool.memory.buffer
        return [
            buffer[begin * size : (begin + count) * size] for begin, _, count in runs(block_ids, range(len(block_ids)))
        ]
