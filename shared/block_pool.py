"""Blocks and the prefix cache over them: what a worker's scheduler allocates from.

    pool = BlockPool(num_blocks=1024, block_tokens=16, prefix_cache=True, model_digest=layout.model_digest)
    held = pool.match(prompt, cache_salt="", max_tokens=len(prompt) - 1)  # cached full blocks, pinned for the caller
    blocks = held + pool.allocate(blocks_needed - len(held))
    pool.commit(prompt, blocks, cache_salt="", num_computed=512)  # after the forward that wrote their KV
    pool.free(blocks)  # cached ones stay until others need them

A cached block is named by the digest of its whole history: blake2b over the parent's digest and the block's token ids,
seeded by the model digest and the cache salt. So equal names mean equal KV, and a salt sees no other salt's blocks.
The cache is closed under prefixes: the block before a cached block is cached too, so each cached block can be matched.
Not thread-safe; it has one owner.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from shared.block_allocator import BlockAllocator, OutOfBlocks

__all__ = ["BlockPool", "OutOfBlocks"]

DIGEST_BYTES = 32


@dataclass(eq=False, slots=True)
class _Cached:
    """A cached block, linked to the block before it and those after it."""

    block: int
    digest: bytes
    parent: _Cached | None
    children: set[_Cached] = field(default_factory=set)


class BlockPool:
    """A reference-counted pool whose unreferenced cached blocks are kept until their room is needed.

    num_blocks: blocks in memory, the null block included. block_tokens: tokens in a block.
    prefix_cache: False = match finds nothing and commit keeps nothing.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, prefix_cache: bool, model_digest: str) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens: {block_tokens} is not positive")
        self.block_tokens = block_tokens
        self._allocator = BlockAllocator(num_blocks)
        self._enabled = prefix_cache
        self._model_digest = model_digest.encode()
        # the cache holds one reference of its own on each of its blocks
        self._by_digest: dict[bytes, _Cached] = {}
        self._by_block: dict[int, _Cached] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and held by nobody else, least recent first
        # digests of held blocks whose content another block caches, so that the other one stays as fresh as its copies
        self._copies: dict[int, bytes] = {}

    @property
    def num_total(self) -> int:
        """Blocks that can be allocated."""
        return self._allocator.num_total

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free ones and those that are only cached."""
        return self._allocator.num_free + len(self._evictable)

    @property
    def num_allocated(self) -> int:
        """Blocks held by someone."""
        return self.num_total - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that `match` can find, held or not."""
        return len(self._by_block)

    def match(self, token_ids: Sequence[int], cache_salt: str, max_tokens: int) -> list[int]:
        """The longest cached run of full blocks at the start of a history, one reference each for the caller.

        max_tokens: tokens covered at most; len(token_ids) - 1 leaves one to compute, whose logits are wanted.
        """
        blocks: list[int] = []
        if not self._by_digest:
            return blocks
        digest = self._seed(cache_salt)
        tokens = array("I", token_ids[: max(max_tokens, 0)])
        for index in range(len(tokens) // self.block_tokens):
            digest = self._chain(digest, tokens, index)
            cached = self._by_digest.get(digest)
            if cached is None:
                break
            blocks.append(cached.block)
        self._allocator.share(blocks)
        for block in blocks:
            self._evictable.pop(block, None)
        return blocks

    def allocate(self, n: int) -> list[int]:
        """Takes n blocks with one reference each, evicting the least recently used cached blocks that nobody holds.

        Raises OutOfBlocks, having taken and evicted none.
        """
        if n > self.num_free:
            raise OutOfBlocks(n, self.num_free)
        while self._allocator.num_free < n:
            self._drop(self._by_block[next(iter(self._evictable))])
        return self._allocator.allocate(n)

    def commit(self, token_ids: Sequence[int], blocks: Sequence[int], cache_salt: str, num_computed: int) -> None:
        """Enters a history's full blocks into the cache.

        token_ids: the history from its start. blocks: its block table, held by the caller.
        num_computed: leading tokens whose KV is written for good; later calls may only extend the history of a block.
        Idempotent, and costs nothing for blocks that are cached already. Where equal content is cached in another one,
        that stays. Raises ValueError if num_computed exceeds the tokens or blocks, or a block is not held.
        """
        num_full = num_computed // self.block_tokens
        if num_computed > len(token_ids) or num_full > len(blocks):
            raise ValueError(
                f"num_computed: {num_computed} exceeds the {len(token_ids)} tokens or the {len(blocks)} blocks given"
            )
        if not self._enabled:
            return
        first = num_full
        parent: _Cached | None = None
        while first > 0 and parent is None:
            # closed under prefixes: what comes before a cached block needs no look
            parent = self._cached_content(blocks[first - 1])
            first -= parent is None
        self._check_held(blocks[first:num_full])
        digest = parent.digest if parent else self._seed(cache_salt)
        tokens = array("I", token_ids[first * self.block_tokens : num_full * self.block_tokens])
        for index in range(first, num_full):
            digest = self._chain(digest, tokens, index - first)
            cached = self._by_digest.get(digest)
            if cached is None:
                cached = self._add(blocks[index], digest, parent)
            elif cached.block != blocks[index]:
                self._copies[blocks[index]] = digest
            parent = cached

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block. Raises ValueError, having changed none, if one is free or listed twice."""
        self._check_held(blocks)
        self._allocator.share(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each block. Raises ValueError, having changed none, if one is free or listed twice.

        blocks: in the order of a block table: of those that stay cached, the last will be evicted first.
        """
        self._check_held(blocks)
        self._allocator.free(blocks)
        for block in reversed(blocks):
            if block in self._by_block:
                if self._allocator.references(block) == 1:
                    self._evictable[block] = None
            elif self._allocator.references(block) == 0 and (digest := self._copies.pop(block, None)):
                twin = self._by_digest.get(digest)
                if twin and twin.block in self._evictable:
                    self._evictable.move_to_end(twin.block)

    def clear_cache(self) -> None:
        """Forgets every cached block; those that nobody holds become free."""
        for cached in [c for c in self._by_block.values() if c.parent is None]:
            self._drop(cached)

    def _seed(self, cache_salt: str) -> bytes:
        digest = blake2b(digest_size=DIGEST_BYTES, person=b"tandem-kv")
        for part in (self._model_digest, cache_salt.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def _chain(self, parent: bytes, tokens: array[int], index: int) -> bytes:
        begin = index * self.block_tokens
        return blake2b(parent + tokens[begin : begin + self.block_tokens].tobytes(), digest_size=DIGEST_BYTES).digest()

    def _cached_content(self, block: int) -> _Cached | None:
        """The cache's entry for what a committed block holds."""
        return self._by_block.get(block) or self._by_digest.get(self._copies.get(block, b""))

    def _add(self, block: int, digest: bytes, parent: _Cached | None) -> _Cached:
        cached = _Cached(block, digest, parent)
        self._allocator.share([block])
        self._copies.pop(block, None)
        self._by_digest[digest] = self._by_block[block] = cached
        if parent:
            parent.children.add(cached)
        return cached

    def _drop(self, root: _Cached) -> None:
        """Takes a block and all that follow it out of the cache: without it they could not be matched."""
        if root.parent:
            root.parent.children.discard(root)
        dropped = [root]
        for cached in dropped:
            dropped.extend(cached.children)
        for cached in dropped:
            del self._by_digest[cached.digest], self._by_block[cached.block]
            self._evictable.pop(cached.block, None)
        self._allocator.free([cached.block for cached in dropped])

    def _check_held(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self._allocator.references(block) == (block in self._by_block):
                raise ValueError(f"block {block} is not held by anyone")
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"a block is listed twice in {list(blocks)}")
