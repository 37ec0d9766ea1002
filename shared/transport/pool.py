"""A KV pool and the memory that it lies in. A worker has one; ranks that compute one model in parallel have one each.

All of a worker's pools belong to it, and have the same number of blocks: block 7 of the worker is block 7 in each.
So have they the same marks (device_pool.py): mark 7 of the worker is mark 7 of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shared.kv_cache import KvLayout
from shared.transport.device_pool import DevicePool
from shared.transport.pool_memory import PoolMemory


@dataclass(frozen=True, slots=True)
class Pool:
    """memory: of the pool or, if `device` holds it, a place beside it for blocks that cannot be reached there.

    Raises ValueError for memory that is no whole number of blocks.
    """

    layout: KvLayout
    memory: PoolMemory
    device: DevicePool | None = None

    def __post_init__(self) -> None:
        num_bytes = self.memory.num_bytes if self.device is None else self.device.num_bytes
        if num_bytes % self.layout.block_bytes or self.memory.num_bytes != num_bytes:
            raise ValueError(
                f"{num_bytes} and {self.memory.num_bytes} bytes are no whole number of blocks of "
                f"{self.layout.block_bytes} bytes"
            )

    @property
    def num_blocks(self) -> int:
        return self.memory.num_bytes // self.layout.block_bytes

    @property
    def blocks(self) -> Tensor:
        """uint8 [num_blocks, block_bytes], wherever it lies."""
        tensor = self.memory.tensor if self.device is None else self.device.tensor
        return tensor.view(-1, self.layout.block_bytes)

    def close(self) -> None:
        if self.device is not None:
            self.device.close()
        self.memory.close()


def mark(pools: Sequence[Pool]) -> int:
    """Marks this moment in what this process has told the devices of a worker's pools: one number names it on each.

    0 for pools in host memory. All marks of these pools are set here.
    """
    [mark] = {0 if pool.device is None else pool.device.mark() for pool in pools}
    return mark


def settle(pools: Sequence[Pool], mark: int) -> None:
    """This thread waits until the pools' devices have passed a mark. ValueError for one that was never set."""
    for pool in pools:
        if pool.device is not None:
            pool.device.settle(mark)
