"""What a decode worker knows and holds of one life of a prefill worker's pools, and the handshake that makes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from pydantic import SecretStr
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared.auth import send_key
from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.rpc import connect, from_grpc, mismatch, stale
from shared.transport.device_mapping import DeviceMapping
from shared.transport.mapping import Mapping
from shared.transport.routes import Route, routes
from shared.transport.target import DeviceTarget, Target
from shared.transport.wire import (
    CUDA_IPC,
    INLINE,
    SHARED_MEMORY,
    TRANSPORT_NAMES,
    TRANSPORTS,
    check_layouts,
    describe,
    host_id,
    layout_to_proto,
    pools_from_proto,
    refusal,
    requirement,
)

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Pair:
    """An agreed transport to a worker's pools. What it holds is given up once it is retired and no copy uses it."""

    kv_endpoint: str
    worker_id: str  # of the prefill worker
    epoch: int
    num_blocks: int
    layout: KvLayout  # of the prefill worker's pools together
    pools: tuple[KvLayout, ...]  # of each
    routes: tuple[Route, ...]  # from them to this worker's pools
    transport: types_pb2.Transport.ValueType
    refusals: tuple[types_pb2.TransportRefusal, ...]  # better transports, and why they are not used
    channel: grpc.aio.Channel
    mappings: dict[int, Mapping | DeviceMapping]  # of the pools that a route begins at; none: their bytes come inline
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
        for mapping in self.mappings.values():
            mapping.close()
        self._closing = asyncio.get_running_loop().create_task(self._close())

    async def _close(self) -> None:
        try:
            await self.channel.close()
        finally:
            self.closed.set()


async def shake_hands(
    kv_endpoint: str,
    targets: Sequence[Target],
    worker_id: str,
    config: TransportConfig,
    key: SecretStr | None = None,
    *,
    current: Pair | None = None,
) -> Pair:
    """Agrees with the prefill worker at host:port on the best transport that both can use, having tried it.

    targets: this worker's pools. current: the pair there is, which is given back if no better one can be: a pool is
    mapped once.
    Raises FAILED_PRECONDITION naming the layout field that differs, or `transport.require` and why it cannot be met;
    UNAVAILABLE if nobody answers.
    """
    refusals: list[types_pb2.TransportRefusal] = []
    request = kv_pb2.HandshakeRequest(
        layout=layout_to_proto(KvLayout.joined([target.layout for target in targets])),
        worker_id=worker_id,
        host_id=host_id(),
        converts_dtype=config.convert_dtype,
    )
    for transport, name in sorted(TRANSPORT_NAMES.items(), reverse=True):
        if name in config.disable:
            refusals.append(refusal(transport, "the decode worker's transport.disable names it"))
        elif transport == CUDA_IPC and not all(isinstance(target, DeviceTarget) for target in targets):
            if config.require == name:  # else nobody expects it
                refusals.append(refusal(transport, "the decode worker's pool is not on a CUDA device"))
        else:
            request.transports.append(transport)
    channel = connect(kv_endpoint, interceptors=send_key(key))
    try:
        try:
            response = await kv_pb2_grpc.KvServiceStub(channel).Handshake(request, timeout=HANDSHAKE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None
        check_layouts(response.layout, request.layout, converts_dtype=config.convert_dtype)
        offers = pools_from_proto(response)
        pools = tuple(layout for layout, _ in offers)
        ways = tuple(routes(pools, [target.layout for target in targets]))
        if response.num_blocks < 2 or not response.epoch:
            raise mismatch("handshake", f"a pool of {response.num_blocks} blocks and epoch {response.epoch} cannot be")
        refusals.extend(response.refusals)
        if current is not None and current.epoch == response.epoch and current.transport >= _best(offers):
            await channel.close()
            return current
        transport, mappings = await _first_usable(request, response, offers, targets, ways, refusals)
        if transport < TRANSPORTS.get(config.require or "", 0):
            for mapping in mappings.values():
                mapping.close()
            raise requirement(str(config.require), refusals)
        return Pair(
            kv_endpoint=kv_endpoint,
            worker_id=response.worker_id,
            epoch=response.epoch,
            num_blocks=response.num_blocks,
            layout=KvLayout.joined(pools),
            pools=pools,
            routes=ways,
            transport=transport,
            refusals=tuple(r for r in refusals if r.transport > transport),
            channel=channel,
            mappings=mappings,
        )
    except BaseException:
        await channel.close()
        raise


# of each of a peer's pools its layout, and how to reach it
Offers = Sequence[tuple[KvLayout, Sequence[kv_pb2.KvHandle]]]


def _offered(offers: Offers) -> dict[types_pb2.Transport.ValueType, list[kv_pb2.KvHandle]]:
    """By transport, the handle of each pool; only those that reach every pool."""
    of_pools = [{_transport_of(handle): handle for handle in handles} for _, handles in offers]
    transports = set(of_pools[0]).intersection(*of_pools[1:])
    return {transport: [handles[transport] for handles in of_pools] for transport in transports}


def _best(offers: Offers) -> types_pb2.Transport.ValueType:
    return max(_offered(offers), default=types_pb2.TRANSPORT_UNSPECIFIED)


def _transport_of(handle: kv_pb2.KvHandle) -> types_pb2.Transport.ValueType:
    kind = handle.WhichOneof("kind")
    return TRANSPORTS.get(kind or "", types_pb2.TRANSPORT_UNSPECIFIED)


async def _first_usable(
    request: kv_pb2.HandshakeRequest,
    response: kv_pb2.HandshakeResponse,
    offers: Offers,
    targets: Sequence[Target],
    ways: Sequence[Route],
    refusals: list[types_pb2.TransportRefusal],
) -> tuple[types_pb2.Transport.ValueType, dict[int, Mapping | DeviceMapping]]:
    """The best offer that works for all pools; what is in the way of better ones is added to `refusals`."""
    offered = _offered(offers)
    for transport in sorted(offered, reverse=True):
        if transport == INLINE:
            return INLINE, {}
        if transport not in request.transports:
            continue
        mappings: dict[int, Mapping | DeviceMapping] = {}
        try:
            for number, ((layout, _), handle) in enumerate(zip(offers, offered[transport], strict=True)):
                num_bytes = response.num_blocks * layout.block_bytes
                if transport == SHARED_MEMORY and handle.shared_memory.num_bytes != num_bytes:
                    raise mismatch("shared_memory.num_bytes", f"{response.num_blocks} blocks are {num_bytes} bytes")
                if used := [(targets[way.target], way) for way in ways if way.source == number]:
                    mappings[number] = await asyncio.to_thread(_map, handle, response.epoch, layout, num_bytes, used)
            return transport, mappings
        except BaseException as error:
            for mapping in mappings.values():
                mapping.close()
            if not isinstance(error, OSError):
                raise
            refusals.append(refusal(transport, str(error)))
    raise mismatch("transports", f"no transport is left: {describe(refusals)}")


def _map(
    handle: kv_pb2.KvHandle,
    epoch: int,
    layout: KvLayout,
    num_bytes: int,
    used: Sequence[tuple[Target, Route]],
) -> Mapping | DeviceMapping:
    """Maps a pool, and moves a block out of it to every target. Blocks; raises OSError."""
    if handle.HasField("cuda_ipc"):
        drivers = [target.driver for target, _ in used if isinstance(target, DeviceTarget)]
        mapping = DeviceMapping(drivers, handle.cuda_ipc, epoch, num_bytes)
    else:
        path, staged = handle.shared_memory.socket_path, handle.shared_memory.staged
        mapping = Mapping(path, epoch, num_bytes, staged=staged)
    try:
        source = mapping.tensor if isinstance(mapping, Mapping) else mapping
        for target, route in used:
            target.probe(source, layout, route)
    except BaseException:
        mapping.close()
        raise
    return mapping
