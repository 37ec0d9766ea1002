"""The prefill side of the KV handoff: offers its pool to decode workers and serves KvService.

    exporter = Exporter(layout, memory, worker_id=..., kv_endpoint="10.0.0.1:50061", config=config.transport)
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
from typing import TYPE_CHECKING, Any

import grpc
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared.config import TransportConfig
from shared.rpc import handler, invalid, mismatch, stale
from shared.transport.block_copy import runs
from shared.transport.cuda import CudaError
from shared.transport.descriptor_socket import DescriptorServer
from shared.transport.device_pool import DevicePool
from shared.transport.pool_memory import PoolMemory
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

if TYPE_CHECKING:
    from shared.kv_cache import KvLayout

log = logging.getLogger(__name__)

RELEASE_S = 2.0


class Exporter(kv_pb2_grpc.KvServiceServicer):
    """A pool that decode workers copy from. `epoch` names this life of it: a restarted worker has another one.

    kv_endpoint: host:port at which decode workers reach the server that this servicer is added to.
    device: holds the pool, if it is on one; then a block is put into `memory` when somebody cannot reach it there.
    """

    def __init__(
        self,
        layout: KvLayout,
        memory: PoolMemory,
        *,
        worker_id: str,
        kv_endpoint: str,
        config: TransportConfig,
        device: DevicePool | None = None,
    ) -> None:
        num_bytes = memory.num_bytes if device is None else device.num_bytes
        if num_bytes % layout.block_bytes or memory.num_bytes != num_bytes:
            raise ValueError(
                f"{num_bytes} and {memory.num_bytes} bytes are no whole number of blocks of {layout.block_bytes} bytes"
            )
        self.epoch = secrets.randbits(63) | 1  # 0 is never an epoch
        self.num_blocks = memory.num_bytes // layout.block_bytes
        self._layout = layout
        self._layout_proto = layout_to_proto(layout)
        self._memory = memory
        self._device = device
        self._worker_id = worker_id
        self._kv_endpoint = kv_endpoint
        self._config = config
        self._exports: dict[str, set[int]] = {}
        self._sockets: list[DescriptorServer] = []
        self._handles = {INLINE: kv_pb2.KvHandle(inline=kv_pb2.InlineHandle(chunk_bytes=CHUNK_BYTES))}
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
                self._handles[transport] = prepare()
            except OSError as error:
                self._refusals[transport] = str(error)
        required = TRANSPORTS.get(self._config.require or "", INLINE)
        if max(self._handles) < required:
            self.close()
            raise requirement(str(self._config.require), [refusal(t, reason) for t, reason in self._refusals.items()])
        for transport in [t for t in self._handles if t < required]:
            del self._handles[transport]
            self._refusals[transport] = f"the prefill worker's transport.require is {self._config.require}"

    def _offer_shared_memory(self) -> kv_pb2.KvHandle:
        socket_path = self._listen(self._memory.read_only_fd(), self._memory.num_bytes)
        handle = kv_pb2.SharedMemoryHandle(
            socket_path=socket_path, num_bytes=self._memory.num_bytes, staged=self._device is not None
        )
        return kv_pb2.KvHandle(shared_memory=handle)

    def _offer_cuda_ipc(self) -> kv_pb2.KvHandle:
        if self._device is None:
            raise CudaError("the prefill worker's pool is not on a CUDA device")
        handle = kv_pb2.CudaIpcHandle(
            handle=self._device.handle,
            device_uuid=self._device.driver.uuid,
            num_bytes=self._device.size,
            event_handles=self._device.event_handles(),
        )
        handle.socket_path = self._listen(self._device.descriptor(), self._device.size, suffix=".cuda")
        return kv_pb2.KvHandle(cuda_ipc=handle)

    def _listen(self, fd: int | None, num_bytes: int, suffix: str = "") -> str:
        server = DescriptorServer(fd, self.epoch, num_bytes, self._config.socket_dir, suffix=suffix)
        self._sockets.append(server)
        return str(server.path)

    async def release(self) -> None:
        """Has every process that maps a device's memory let go of it, within RELEASE_S: what a handle leads to must not
        be freed before. Nobody can map it any more."""
        if self._device is None:
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
            checksum = 0
            await self._stage(block_ids, mark)
            for piece in self._pieces(block_ids):
                checksum = zlib.crc32(piece, checksum)
            extent.crc32 = checksum
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
        for transport in sorted(set(request.transports), reverse=True):  # best first
            if reason := self._refusal(transport, request.host_id):
                response.refusals.append(refusal(transport, reason))
            else:
                response.handles.append(self._handles[transport])
        if not response.handles:
            field = "transport.require" if self._config.require else "transports"
            raise mismatch(field, f"no transport is left: {describe(response.refusals)}")
        return response

    @handler
    async def Fetch(
        self, request: kv_pb2.FetchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kv_pb2.FetchResponse]:
        if request.epoch != self.epoch:
            raise stale(f"epoch {request.epoch} of the pool is over; it is {self.epoch} now")
        export = self._exports.get(request.export_id)
        self._check_open(request.export_id, export)
        if not request.block_ids:
            await self._settle(request.mark)
            return
        check_blocks("block_ids", request.block_ids, self.num_blocks)
        if export is not None and not export.issuperset(request.block_ids):
            raise invalid("block_ids", "not all of them belong to the export")
        await self._stage(request.block_ids, request.mark)
        if request.stage:
            self._check_open(request.export_id, export)
            return
        pieces: list[memoryview] = []
        size = 0
        for piece in self._pieces(request.block_ids):
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

    async def _settle(self, mark: int) -> None:
        """Waits until the device has passed a mark."""
        if self._device is not None:
            try:
                await asyncio.to_thread(self._device.settle, mark)
            except ValueError as error:
                raise invalid("mark", str(error)) from None

    async def _stage(self, block_ids: Sequence[int], mark: int) -> None:
        """Puts blocks of a pool on a device where `_pieces` and other processes read them."""
        if self._device is None:
            return
        staging = self._memory.tensor.view(self.num_blocks, -1)
        try:
            await asyncio.to_thread(self._device.copy_out, list(block_ids), staging, mark)
        except ValueError as error:
            raise invalid("mark", str(error)) from None

    def _chunk(self, export_id: str, export: set[int] | None, pieces: list[memoryview]) -> kv_pb2.FetchResponse:
        # looked up anew for each chunk: once the export is closed its blocks may hold another request's tokens
        self._check_open(export_id, export)
        return kv_pb2.FetchResponse(data=b"".join(pieces))

    def _check_open(self, export_id: str, export: set[int] | None) -> None:
        if export is None or self._exports.get(export_id) is not export:
            raise stale(f"export {export_id[:200]!r} has ended")

    def _pieces(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of blocks, neighbours in one piece."""
        size = self._layout.block_bytes
        buffer = self._memory.buffer
        return [
            buffer[begin * size : (begin + count) * size] for begin, _, count in runs(block_ids, range(len(block_ids)))
        ]
