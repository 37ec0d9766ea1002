"""A pool of a decode worker as the place that tokens are moved to, out of blocks of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from kernels.kv_format import KvFormat
from kernels.transfer import transfer_tokens
from shared.kv_cache import KvLayout
from shared.transport.block_copy import PIECE_BYTES, copy_blocks
from shared.transport.device_mapping import DeviceMapping
from shared.transport.device_pool import DevicePool
from shared.transport.pool import Pool
from shared.transport.routes import Route


@dataclass(frozen=True, slots=True)
class Move:
    """num_tokens rows, from slot source_slot of the first of the blocks `source` to target_slot of those of `target`.

    layout: of the source. route: which heads. source_mark: of the source's device, before which its blocks are not
    written. target_mark: of the target's, before which others use its blocks.
    """

    layout: KvLayout
    route: Route
    source: Sequence[int]
    source_slot: int
    target: Sequence[int]
    target_slot: int
    num_tokens: int
    source_mark: int = 0
    target_mark: int = 0


class Target(Protocol):
    """`pull` blocks its thread until not one byte more will be written."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def pull(self, source: Tensor | DeviceMapping, move: Move, stop: Event) -> bool:
        """Moves rows out of a pool: uint8 [num_bytes] on the host, or one on a device. False: `stop` was set midway."""
        ...

    def probe(self, source: Tensor | DeviceMapping, layout: KvLayout, route: Route) -> None:
        """Moves the null block of a pool to a place of no use: what fails is to fail before a request does."""
        ...

    def close(self) -> None:
        """No copy may be running."""
        ...


class HostTarget:
    """A pool in `buffer`: writable, whole blocks of the layout."""

    def __init__(self, layout: KvLayout, buffer: memoryview | bytearray) -> None:
        self.layout = layout
        self._pool = torch.frombuffer(buffer, dtype=torch.uint8).view(-1, layout.block_bytes)
        self.num_blocks = self._pool.shape[0]

    def pull(self, source: Tensor | DeviceMapping, move: Move, stop: Event) -> bool:
        return self._pull(source, move, self._pool, stop)

    def probe(self, source: Tensor | DeviceMapping, layout: KvLayout, route: Route) -> None:
        self._pull(source, _null_block(layout, route, self.layout), torch.empty_like(self._pool[:1]), Event())

    def _pull(self, source: Tensor | DeviceMapping, move: Move, pool: Tensor, stop: Event) -> bool:
        assert isinstance(source, Tensor)
        layout, block_tokens = self.layout, self.layout.block_tokens
        whole = not (move.source_slot % block_tokens or move.target_slot % block_tokens)
        if whole and move.layout == layout and move.route.num_heads == layout.num_kv_heads:
            blocks = -(-move.num_tokens // block_tokens)
            first, place = move.source_slot // block_tokens, move.target_slot // block_tokens
            return copy_blocks(
                source.data_ptr(),
                pool.data_ptr(),
                layout.block_bytes,
                move.source[first : first + blocks],
                move.target[place : place + blocks],
                stop,
            )
        # one call for about as many bytes as one of memmove moves
        step = max(1, PIECE_BYTES * move.layout.block_tokens // move.layout.block_bytes)
        tables = torch.tensor(move.source, dtype=torch.int32), torch.tensor(move.target, dtype=torch.int32)
        for begin in range(0, move.num_tokens, step):
            if stop.is_set():
                return False
            _transfer(source, pool, layout.format, move, tables, begin, min(step, move.num_tokens - begin))
        return True

    def close(self) -> None:
        self._pool = torch.empty(0, self.layout.block_bytes, dtype=torch.uint8)


class DeviceTarget:
    """A pool on a CUDA device. Its copies are done on a stream of their own, beside what the worker computes."""

    def __init__(self, layout: KvLayout, pool: DevicePool) -> None:
        self.layout = layout
        self.driver = pool.driver
        self._device_pool = pool
        self._pool = pool.tensor.view(-1, layout.block_bytes)
        self.num_blocks = self._pool.shape[0]
        self._stream = self.driver.create_stream()

    def pull(self, source: Tensor | DeviceMapping, move: Move, stop: Event) -> bool:
        return self._pull(source, move, self._pool, stop)

    def probe(self, source: Tensor | DeviceMapping, layout: KvLayout, route: Route) -> None:
        self._pull(source, _null_block(layout, route, self.layout), torch.empty_like(self._pool[:1]), Event())

    def _pull(self, source: Tensor | DeviceMapping, move: Move, pool: Tensor, stop: Event) -> bool:
        if stop.is_set() or (isinstance(source, DeviceMapping) and not source.settle(move.source_mark, stop)):
            return False
        driver, stream = self.driver, self._stream
        self._device_pool.wait(stream, move.target_mark)

        def work() -> None:
            device = pool.device
            # read by the launch alone, and freed on this stream after it; nobody waits for so few bytes
            tables = [
                torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)
                for table in (move.source, move.target)
            ]
            if isinstance(source, DeviceMapping):
                _transfer(source.on(driver), pool, self.layout.format, move, tables, 0, move.num_tokens)
                return
            blocks = source.view(-1, move.layout.block_bytes)[torch.tensor(move.source)].to(device)
            tables[0] = torch.arange(len(move.source), dtype=torch.int32, device=device)
            _transfer(blocks, pool, self.layout.format, move, tables, 0, move.num_tokens)

        done = driver.create_event()
        try:
            driver.run(stream, work)
        finally:
            try:  # whatever went wrong, what was launched may still write
                driver.record(done, stream)
                driver.synchronize(done)
            finally:
                driver.destroy_event(done)
        return True

    def close(self) -> None:
        """No copy may be running."""
        self.driver.destroy_stream(self._stream)


def target_of(pool: Pool) -> HostTarget | DeviceTarget:
    """Where a pool lies is where its tokens are moved."""
    if pool.device is not None:
        return DeviceTarget(pool.layout, pool.device)
    return HostTarget(pool.layout, pool.memory.buffer)


def _null_block(source: KvLayout, route: Route, target: KvLayout) -> Move:
    return Move(source, route, [0], 0, [0], 0, min(source.block_tokens, target.block_tokens))


def _transfer(
    source: Tensor, pool: Tensor, form: KvFormat, move: Move, tables: Sequence[Tensor], begin: int, num_tokens: int
) -> None:
    transfer_tokens(
        source.view(-1, move.layout.block_bytes),
        move.layout.format,
        tables[0],
        move.source_slot + begin,
        pool,
        form,
        tables[1],
        move.target_slot + begin,
        num_tokens,
        source_head=move.route.source_head,
        target_head=move.route.target_head,
        num_heads=move.route.num_heads,
    )
