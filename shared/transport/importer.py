"""The decode side of the KV handoff: moves exported tokens into this worker's pools.

    importer = Importer([HostTarget(layout, memory.buffer)], worker_id=..., config=config.transport)
    pair = await importer.connect("10.0.0.1:50061")  # ahead of traffic; `copy` connects by itself too
    result = await importer.copy(extent, block_table, held_tokens)

All methods belong to one event loop; the bytes move on threads of the importer's own.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event

import grpc
import torch
from pydantic import SecretStr
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2
from torch import Tensor

from shared.config import TransportConfig
from shared.rpc import from_grpc, invalid, mismatch, stale, unavailable
from shared.transport.block_copy import PIECE_BYTES
from shared.transport.device_mapping import DeviceMapping
from shared.transport.mapping import Mapping
from shared.transport.pair import Pair, shake_hands
from shared.transport.target import Move, Target
from shared.transport.wire import CHUNK_BYTES, check_blocks, check_endpoint, check_extent

COPY_THREADS = 2
CONFIRM_TIMEOUT_S = 10.0
MAX_PAIRS = 256


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What an import cost."""

    num_bytes: int
    seconds: float  # in the copy itself, from its start to the last byte
    transport: types_pb2.Transport.ValueType
    refusals: tuple[types_pb2.TransportRefusal, ...]  # better transports, and why they were not used


class Importer:
    """Moves tokens out of other workers' pools into `targets`, this worker's own.

    They have one number of blocks, and a block of the worker is the blocks of one number in all of them.
    """

    def __init__(
        self, targets: Sequence[Target], *, worker_id: str, config: TransportConfig, key: SecretStr | None = None
    ) -> None:
        """key: the cluster's, if prefill workers ask for one."""
        self._targets = tuple(targets)
        self._block_tokens, self._num_blocks = targets[0].layout.block_tokens, targets[0].num_blocks
        if any(target.num_blocks != self._num_blocks for target in targets):
            raise ValueError(f"pools of {[target.num_blocks for target in targets]} blocks are none of one worker")
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

    async def copy(
        self, extent: kv_pb2.KvExtent, block_table: Sequence[int], from_token: int = 0, *, mark: int = 0
    ) -> CopyResult:
        """Copies the extent's tokens to where they belong in a history whose blocks here are block_table.

        from_token: those before it are there already, and stay as they are. mark: of this worker's own device, before
        which its blocks may still be in use.
        When this returns or raises, cancellation included, no byte will be written any more: only then may the caller
        free the blocks. Cancellation ends the copy within a piece (block_copy.py), a chunk or a launch.
        Raises ABORTED if the pool's epoch or the export is over or the bytes fail their checksum (hand over again);
        UNAVAILABLE if the peer is gone; FAILED_PRECONDITION or INVALID_ARGUMENT for an extent that cannot be used;
        ValueError for a wrong block_table. After any of these the blocks hold anything.
        """
        check_endpoint(extent.kv_endpoint)
        pair = self._pairs.get(extent.kv_endpoint)
        if pair is None or pair.epoch != extent.epoch:
            pair = await self.connect(extent.kv_endpoint)
        if pair.epoch != extent.epoch:
            raise stale(f"the extent is of epoch {extent.epoch} of {extent.kv_endpoint}, which is at {pair.epoch}")
        check_extent(extent, pair.layout)
        check_blocks("extent.block_ids", extent.block_ids, pair.num_blocks)
        target = self._check_destination(extent, block_table, from_token)
        first = max(extent.first_token, from_token)
        sources: dict[int, list[tuple[Target, Move]]] = {}
        for route in pair.routes:
            move = Move(
                layout=pair.pools[route.source],
                route=route,
                source=list(extent.block_ids),
                source_slot=first - extent.first_token,
                target=target,
                target_slot=first % self._block_tokens,
                num_tokens=extent.first_token + extent.num_tokens - first,
                source_mark=extent.mark,
                target_mark=mark,
            )
            sources.setdefault(route.source, []).append((self._targets[route.target], move))
        begin = time.perf_counter()
        with pair.in_use():
            for number, moves in sources.items():
                await self._copy_pool(pair, number, extent, moves)
        num_bytes = len(extent.block_ids) * sum(pair.pools[number].block_bytes for number in sources)
        return CopyResult(num_bytes, time.perf_counter() - begin, pair.transport, pair.refusals)

    async def confirm(self, extent: kv_pb2.KvExtent) -> None:
        """Raises ABORTED unless the extent's export is still open: only then is what was copied from it surely its own.

        A mapped pool shows no end of an export, after which its blocks may have been filled anew under the copy.
        Raises UNAVAILABLE if the peer is gone.
        """
        pair = self._pairs.get(extent.kv_endpoint)
        if pair is None or pair.epoch != extent.epoch:
            raise stale(f"epoch {extent.epoch} of the pool of {extent.kv_endpoint} is over")
        if not pair.mappings:  # every chunk of Fetch was checked
            return
        with pair.in_use():
            await self._ask(pair, kv_pb2.FetchRequest(export_id=extent.export_id, epoch=extent.epoch))

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

    async def _connect(self, kv_endpoint: str) -> Pair:
        try:
            current = self._pairs.get(kv_endpoint)
            pair = await shake_hands(
                kv_endpoint, self._targets, self._worker_id, self._config, self._key, current=current
            )
            if pair is current:
                return pair
            current = self._pairs.get(kv_endpoint)
            if current is not None and (current.epoch, current.transport) == (pair.epoch, pair.transport):
                self._retire(pair)
                return current
            if current is not None:
                self._drop(current)
            self._pairs[kv_endpoint] = pair
            for mapping in pair.mappings.values():
                # a dead worker's pool would otherwise stay in memory for as long as it is mapped here
                mapping.watch(lambda: self._drop(pair))
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

    def _check_destination(self, extent: kv_pb2.KvExtent, block_table: Sequence[int], from_token: int) -> list[int]:
        """The blocks that are written to."""
        block_tokens = self._block_tokens
        first, end = max(extent.first_token, from_token), extent.first_token + extent.num_tokens
        blocks = list(block_table[first // block_tokens : -(-end // block_tokens)])
        if first >= end or len(block_table) * block_tokens < end:
            raise ValueError(f"tokens {first} to {end - 1} do not go to {len(block_table)} blocks of {block_tokens}")
        if len(set(blocks)) != len(blocks) or not all(0 < block < self._num_blocks for block in blocks):
            raise ValueError(f"{blocks} are not different blocks in 1..{self._num_blocks - 1}")
        return blocks

    async def _copy_pool(
        self, pair: Pair, number: int, extent: kv_pb2.KvExtent, moves: Sequence[tuple[Target, Move]]
    ) -> None:
        """What of an extent is in the pool of that number, to wherever it belongs."""
        expected = _checksum_of(extent, number, len(pair.pools))
        mapping = pair.mappings.get(number)
        if mapping is None:
            checksum = await self._fetch(pair, number, extent, moves, summed=expected is not None)
        else:
            checksum = await self._copy_mapped(pair, number, mapping, extent, moves, summed=expected is not None)
        if expected is not None and checksum != expected:
            raise stale(f"checksum {checksum:08x} of the copied blocks is not the extent's {expected:08x}")

    async def _copy_mapped(
        self,
        pair: Pair,
        number: int,
        mapping: Mapping | DeviceMapping,
        extent: kv_pb2.KvExtent,
        moves: Sequence[tuple[Target, Move]],
        *,
        summed: bool,
    ) -> int:
        source = mapping.tensor if isinstance(mapping, Mapping) else mapping
        request = kv_pb2.FetchRequest(export_id=extent.export_id, epoch=extent.epoch, mark=extent.mark, pool=number)
        if isinstance(mapping, Mapping) and mapping.staged:
            request.block_ids.extend(extent.block_ids)
            request.stage = True
            await self._ask(pair, request)
        elif isinstance(mapping, DeviceMapping) and extent.mark and not mapping.waits:
            await self._ask(pair, request)
        if not summed:
            for target, move in moves:
                await self._pull(target, source, move)
            return 0
        # summed and moved from a copy that nobody else can change in between
        pool, table = mapping.tensor.view(-1, pair.pools[number].block_bytes), torch.tensor(list(extent.block_ids))
        blocks = (await asyncio.to_thread(lambda: pool[table].cpu())).view(-1)
        for target, move in moves:
            await self._pull(target, blocks, replace(move, source=range(len(move.source))))
        return zlib.crc32(blocks.numpy().data)

    async def _ask(self, pair: Pair, request: kv_pb2.FetchRequest) -> None:
        """A Fetch that brings no bytes."""
        try:
            async for _ in kv_pb2_grpc.KvServiceStub(pair.channel).Fetch(request, timeout=CONFIRM_TIMEOUT_S):
                pass
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from None

    async def _pull(self, target: Target, source: Tensor | DeviceMapping, move: Move) -> None:
        stop = Event()
        # Not awaited directly: cancelling such a future marks it done while its thread still writes.
        future = asyncio.get_running_loop().run_in_executor(self._threads, target.pull, source, move, stop)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
                stop.set()
        if cancelled is not None:
            raise cancelled
        future.result()

    async def _fetch(
        self,
        pair: Pair,
        number: int,
        extent: kv_pb2.KvExtent,
        moves: Sequence[tuple[Target, Move]],
        *,
        summed: bool,
    ) -> int:
        block_bytes, block_tokens = pair.pools[number].block_bytes, pair.layout.block_tokens
        num_blocks = len(extent.block_ids)
        missing = num_blocks * block_bytes
        checksum = 0
        # as many blocks as are moved at a time
        piece = memoryview(bytearray(min(num_blocks, max(1, PIECE_BYTES // block_bytes)) * block_bytes))
        filled = moved = 0  # bytes of the piece; blocks before it
        request = kv_pb2.FetchRequest(
            export_id=extent.export_id,
            epoch=extent.epoch,
            block_ids=extent.block_ids,
            mark=extent.mark,
            pool=number,
        )
        call = kv_pb2_grpc.KvServiceStub(pair.channel).Fetch(request)
        try:
            async for response in call:
                missing -= len(response.data)
                if missing < 0 or len(response.data) > CHUNK_BYTES:
                    raise mismatch("fetch", f"{pair.kv_endpoint} sends more bytes than were asked for")
                if summed:
                    checksum = zlib.crc32(response.data, checksum)
                data = memoryview(response.data)
                while data:
                    count = min(len(data), len(piece) - filled)
                    piece[filled : filled + count] = data[:count]
                    data, filled = data[count:], filled + count
                    if filled == len(piece) or not missing:
                        count, slot = filled // block_bytes, moved * block_tokens
                        for target, move in moves:
                            await self._pull_part(target, piece[:filled], move, slot, count * block_tokens)
                        filled, moved = 0, moved + count
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                self._drop(pair)  # the next attempt gets a channel that waits for no backoff
            raise from_grpc(error) from None
        finally:
            call.cancel()
        if missing:
            raise mismatch("fetch", f"{pair.kv_endpoint} sent {missing} bytes less than were asked for")
        return checksum

    async def _pull_part(self, target: Target, data: memoryview, move: Move, first_slot: int, num_slots: int) -> None:
        """Moves what a run of the source's blocks holds of a move: slots first_slot and so on of its first block."""
        begin = max(first_slot, move.source_slot)
        end = min(first_slot + num_slots, move.source_slot + move.num_tokens)
        if begin >= end:
            return
        part = replace(
            move,
            source=range(num_slots // move.layout.block_tokens),
            source_slot=begin - first_slot,
            target_slot=move.target_slot + begin - move.source_slot,
            num_tokens=end - begin,
        )
        await self._pull(target, torch.frombuffer(data, dtype=torch.uint8), part)


def _checksum_of(extent: kv_pb2.KvExtent, number: int, num_pools: int) -> int | None:
    """What the extent says of a pool's blocks; None where it says nothing. Raises INVALID_ARGUMENT for another number
    of checksums than pools."""
    if num_pools == 1 and not extent.pool_crc32:
        return extent.crc32 if extent.HasField("crc32") else None
    if extent.HasField("crc32") or len(extent.pool_crc32) not in (0, num_pools):
        raise invalid("extent.pool_crc32", f"has {len(extent.pool_crc32)} checksums of {num_pools} pools")
    return extent.pool_crc32[number] if extent.pool_crc32 else None
