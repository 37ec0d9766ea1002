"""Reference-counted blocks of the KV pool.

    allocator = BlockAllocator(num_blocks=1024)
    blocks = allocator.allocate(3)      # one reference each
    allocator.share(blocks)             # another one
    allocator.free(blocks)              # still held
    allocator.free(blocks)              # free again

Block 0 is the null block, where padding rows write: it is never allocated. Not thread-safe; it has one owner.
"""

from __future__ import annotations

from collections.abc import Sequence


class OutOfBlocks(ValueError):
    """More blocks were asked for than can be had; nothing was changed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} blocks are needed, {free} are free")
        self.needed = needed
        self.free = free


class BlockAllocator:
    """Hands out block ids 1..num_blocks-1. Each operation is O(1) per block and happens in full or not at all."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: {num_blocks} leaves no block beside the null block; at least 2 are needed")
        self._references = [0] * num_blocks
        # a stack whose top is the lowest id, so that a young pool hands out contiguous runs, which copy in one piece
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_total(self) -> int:
        """Blocks that can be allocated: all but the null block."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """References to a block, 0 = free. Raises ValueError for an id outside the pool."""
        if not 0 < block < len(self._references):
            raise ValueError(f"block {block} is not in 1..{len(self._references) - 1}")
        return self._references[block]

    def allocate(self, n: int) -> list[int]:
        """Takes n blocks with one reference each. Raises OutOfBlocks, having taken none."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > len(self._free):
            raise OutOfBlocks(n, len(self._free))
        if n == 0:
            return []
        blocks = self._free[-n:]
        del self._free[-n:]
        blocks.reverse()
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block. Raises ValueError, having changed none, if one is free or listed twice."""
        self._check(blocks)
        for block in blocks:
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each block. Raises ValueError, having changed none, if one is free or listed twice."""
        self._check(blocks)
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def grow(self, num_blocks: int) -> None:
        """Adds the blocks that a larger pool has. Raises ValueError for one that is not larger."""
        before = len(self._references)
        if num_blocks <= before:
            raise ValueError(f"num_blocks: {num_blocks} is not more than the {before} that there are")
        self._references += [0] * (num_blocks - before)
        self._free[:0] = range(num_blocks - 1, before - 1, -1)

    def _check(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self.references(block) == 0:
                raise ValueError(f"block {block} is free")
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"a block is listed twice in {list(blocks)}")
