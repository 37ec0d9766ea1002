"""What a decode worker knows and holds of one life of a prefill worker's pool, and the handshake that makes it."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from pydantic import SecretStr
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared.auth import send_key
from shared.config import TransportConfig
from shared.rpc import connect, from_grpc, mismatch, stale
from shared.transport.mapping import Mapping
from shared.transport.wire import (
    INLINE,
    SHARED_MEMORY,
    TRANSPORTS,
    check_layout,
    describe,
    host_id,
    layout_to_proto,
    refusal,
    requirement,
)

if TYPE_CHECKING:
    from shared.kv_cache import KvLayout

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Pair:
    """An agreed transport to a pool. What it holds is given up once it is retired and no copy uses it."""

    kv_endpoint: str
    worker_id: str  # of the prefill worker
    epoch: int
    num_blocks: int
    transport: types_pb2.Transport.ValueType
    refusals: tuple[kv_pb2.TransportRefusal, ...]  # better transports, and why they are not used
    channel: grpc.aio.Channel
    mapping: Mapping | None  # of the pool, if the transport is shared memory
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _users: int = 0
    _retired: bool = False
    _closing: asyncio.Task[None] | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the mapping and the channel while a copy runs. Raises ABORTED if the pool is known to be gone."""
        if self._retired:
            raise stale(f"epoch {self.epoch} of the pool of {self.kv_endpoint} is over")
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_idle()

    def retire(self) -> None:
        """Closes the pair, at once or when its last copy ends."""
        self._retired = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self._retired or self._users or self._closing:
            return
        if self.mapping is not None:
            self.mapping.close()
        self._closing = asyncio.get_running_loop().create_task(self._close())

    async def _close(self) -> None:
        try:
            await self.channel.close()
        finally:
            self.closed.set()


async def shake_hands(
    kv_endpoint: str, layout: KvLayout, worker_id: str, config: TransportConfig, key: SecretStr | None = None
) -> Pair:
    """Agrees with the prefill worker at host:port on the best transport that both can use, having tried it.

    Raises FAILED_PRECONDITION naming the layout field that differs, or `transport.require` and why it cannot be met;
    UNAVAILABLE if nobody answers.
    """
    refusals: list[kv_pb2.TransportRefusal] = []
    request = kv_pb2.HandshakeRequest(
        layout=layout_to_proto(layout), worker_id=worker_id, host_id=host_id(), transports=[INLINE]
    )
    if "shared_memory" in config.disable:
        refusals.append(refusal(SHARED_MEMORY, "the decode worker's transport.disable names it"))
    else:
        request.transports.insert(0, SHARED_MEMORY)
    channel = connect(kv_endpoint, interceptors=send_key(key))
    try:
        try:
            response = await kv_pb2_grpc.KvServiceStub(channel).Handshake(request, timeout=HANDSHAKE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None
        check_layout(request.layout, response.layout)
        if response.num_blocks < 2 or not response.epoch:
            raise mismatch("handshake", f"a pool of {response.num_blocks} blocks and epoch {response.epoch} cannot be")
        refusals.extend(response.refusals)
        transport, mapping = await _first_usable(request, response, layout.block_bytes, refusals)
        if transport < TRANSPORTS.get(config.require or "", 0):
            raise requirement(str(config.require), refusals)
        return Pair(
            kv_endpoint=kv_endpoint,
            worker_id=response.worker_id,
            epoch=response.epoch,
            num_blocks=response.num_blocks,
            transport=transport,
            refusals=tuple(r for r in refusals if r.transport > transport),
            channel=channel,
            mapping=mapping,
        )
    except BaseException:
        await channel.close()
        raise


async def _first_usable(
    request: kv_pb2.HandshakeRequest,
    response: kv_pb2.HandshakeResponse,
    block_bytes: int,
    refusals: list[kv_pb2.TransportRefusal],
) -> tuple[types_pb2.Transport.ValueType, Mapping | None]:
    """The best offer that works; what is in the way of better ones is added to `refusals`."""
    num_bytes = response.num_blocks * block_bytes
    for handle in response.handles:
        if handle.HasField("shared_memory") and SHARED_MEMORY in request.transports:
            if handle.shared_memory.num_bytes != num_bytes:
                raise mismatch("shared_memory.num_bytes", f"{response.num_blocks} blocks are {num_bytes} bytes")
            path = handle.shared_memory.socket_path
            try:
                return SHARED_MEMORY, await asyncio.to_thread(_map, path, response.epoch, num_bytes, block_bytes)
            except OSError as error:
                refusals.append(refusal(SHARED_MEMORY, str(error)))
        elif handle.HasField("inline"):
            return INLINE, None
    raise mismatch("transports", f"no transport is left: {describe(refusals)}")


def _map(path: str, epoch: int, num_bytes: int, block_bytes: int) -> Mapping:
    """Maps a pool and moves its first block, the null block, out of it: what fails is to fail before a request."""
    mapping = Mapping(path, epoch, num_bytes)
    ctypes.memmove(ctypes.create_string_buffer(block_bytes), mapping.address, block_bytes)
    return mapping
