"""The caches of a KvCacheConfig: a pool for each group of layers, whose blocks have numbers of their own.

    kv = KvGroups(KvCacheConfig(cache_shape=(layers, kv_heads, head_size), num_allocation_groups=2), num_blocks=512)
    kv.extend(table, num_tokens, group=1)       # table: a sequence's blocks in that group, [] at first
    attention(qkv, kv.layer(3, group=1), build_batch([BatchEntry(tokens, start, table)], kv.block_tokens))
    kv.free(table, group=1)

Of layers that see a window alone, `type` local, a sequence keeps the blocks that a coming token sees: `forget`.
"""

from __future__ import annotations

import torch

from kernels.kv_format import KvPlanes
from shared.batch import NULL_BLOCK
from shared.block_allocator import BlockAllocator
from shared.config.ragged import KvCacheConfig
from shared.kv_cache import KvCache, KvLayout


class KvGroups:
    """Not thread-safe; it has one owner."""

    def __init__(
        self, config: KvCacheConfig, num_blocks: int, *, window: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """num_blocks: of each group, its null block included. window: of type local, the tokens that a query sees.

        Raises ValueError naming what cannot be: a window that type local has not, or another type has, and a head size
        that is no multiple of 8.
        """
        if (config.type == "local") != (window is not None) or (window is not None and window < 1):
            raise ValueError(f"window: {window}, and type is {config.type}; local has one of 1 or more, dense has none")
        layers, heads, head_size = config.cache_shape
        if head_size % 8:
            raise ValueError(f"cache_shape: a head of {head_size} elements, which is no multiple of 8")
        self.config, self._window = config, window
        layout = KvLayout("", config.cache_dtype, layers, heads, head_size, config.block_size)
        groups = range(config.num_allocation_groups)
        self.caches = tuple(KvCache(layout, num_blocks, device=device) for _ in groups)
        self._allocators = tuple(BlockAllocator(num_blocks) for _ in groups)

    @property
    def block_tokens(self) -> int:
        return self.config.block_size

    @property
    def free_blocks(self) -> list[int]:
        """Of each group."""
        return [allocator.num_free for allocator in self._allocators]

    def layer(self, index: int, group: int = 0) -> KvPlanes:
        """Keys and values of a layer of a group, as views."""
        return self.caches[group].layer(index)

    def extend(self, table: list[int], num_tokens: int, group: int = 0) -> None:
        """Adds blocks to a sequence's table until it covers so many tokens.

        Raises ValueError for more than max_blocks_per_allocation_group, OutOfBlocks for more than are free; the table
        then is as it was.
        """
        missing = max(-(-num_tokens // self.block_tokens) - len(table), 0)
        held, most = len(_held(table)) + missing, self.config.max_blocks_per_allocation_group
        if held > most:
            raise ValueError(
                f"max_blocks_per_allocation_group: {num_tokens} tokens take {held} blocks, and a sequence has {most} "
                "at most; raise it"
            )
        table += self._allocators[group].allocate(missing)

    def forget(self, table: list[int], next_position: int, group: int = 0) -> None:
        """Gives back the blocks that no token from next_position on sees. The null block stands in their places, which
        attention with that window does not read. ValueError where type is not local."""
        if self._window is None:
            raise ValueError("type: dense, and a coming token sees every block; make a cache of type local")
        passed = min(max(next_position - self._window + 1, 0) // self.block_tokens, len(table))
        self._allocators[group].free(_held(table[:passed]))
        table[:passed] = [NULL_BLOCK] * passed

    def free(self, table: list[int], group: int = 0) -> None:
        """Gives a sequence's blocks back, and empties the table. ValueError, with nothing given back, for a block that
        is free already."""
        self._allocators[group].free(_held(table))
        table.clear()


def _held(table: list[int]) -> list[int]:
    return [block for block in table if block != NULL_BLOCK]
