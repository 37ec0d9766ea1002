"""A sequence's keys and values out of any pool: what a swap keeps in host memory, and what a handoff carries.

state = SequenceState.take(kv, blocks, num_tokens=37)   # a copy; the blocks may be freed
state.check_fits(other.layout)                          # another engine's, of other blocks or fewer heads
state.put(other, other_blocks)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.blocks import gather_blocks
from kernels.transfer import transfer_tokens
from shared.kv_cache import KvCache, KvLayout

# what a layout may not differ in, whatever is converted
_FIXED = ("model_digest", "num_layers", "head_dim", "order", "contract_version")


@dataclass(frozen=True, eq=False)
class SequenceState:
    """The rows of the first `num_tokens` tokens of a sequence, in blocks of the pool that they were taken from.

    blocks: uint8 [n, layout.block_bytes] on the host, contiguous. In the last block, what lies behind the tokens has no
    meaning. Raises ValueError for blocks that do not hold so many tokens.
    """

    layout: KvLayout
    blocks: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        shape, given = (self.num_blocks(self.layout.block_tokens), self.layout.block_bytes), self.blocks
        if given.dtype != torch.uint8 or tuple(given.shape) != shape or given.device.type != "cpu":
            raise ValueError(
                f"{self.num_tokens} tokens of this layout are uint8 {list(shape)} on the host, got {given.dtype} "
                f"{list(given.shape)} on {given.device}"
            )

    @classmethod
    def take(cls, kv: KvCache, blocks: Sequence[int], num_tokens: int) -> SequenceState:
        """Copies the tokens' blocks out of a pool. blocks: of the sequence, from its first token on."""
        held = torch.tensor(blocks[: -(-num_tokens // kv.layout.block_tokens)], dtype=torch.int64)
        with torch.cuda.device_of(kv.pool):  # ops are launched on the current device, and this may be another rank's
            return cls(kv.layout, gather_blocks(kv.pool, held.to(kv.pool.device)).cpu(), num_tokens)

    @classmethod
    def joined(cls, states: Sequence[SequenceState]) -> SequenceState:
        """One with the heads of all: a sequence of an engine of several ranks has a state on each.

        Raises ValueError for states of two sequences or layouts, and for heads that are missing between them.
        """
        if len(states) == 1:
            return states[0]
        first, *rest = sorted(states, key=lambda state: state.layout.first_kv_head)
        parts, next_head = [first._planes()], first.layout.first_kv_head + first.layout.num_kv_heads
        for state in rest:
            own = state.layout
            differing = set(first.layout.difference(own)) - {"first_kv_head", "num_kv_heads"}
            if differing or state.num_tokens != first.num_tokens:
                raise ValueError(f"states of two sequences: they differ in {', '.join(differing) or 'num_tokens'}")
            if own.first_kv_head + own.num_kv_heads == next_head:
                continue  # ranks that share a head hold the same
            if own.first_kv_head != next_head:
                raise ValueError(f"num_kv_heads: none of the states has head {next_head}")
            parts.append(state._planes())
            next_head += own.num_kv_heads
        layout = replace(first.layout, num_kv_heads=next_head - first.layout.first_kv_head)
        return cls(layout, torch.cat(parts, 2).flatten(1), first.num_tokens)

    @property
    def num_bytes(self) -> int:
        return self.blocks.numel()

    def num_blocks(self, block_tokens: int) -> int:
        """Blocks of that size that hold the tokens."""
        return -(-self.num_tokens // block_tokens)

    def check_fits(self, layout: KvLayout, *, convert_dtype: bool = False) -> None:
        """Raises ValueError naming what keeps it from a pool of that layout, which may have blocks of another size and
        fewer heads, and with convert_dtype elements of another dtype.
        """
        differing = [name for name in _FIXED if getattr(self.layout, name) != getattr(layout, name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{name}: {getattr(self.layout, name)!r} where the sequence comes from, {getattr(layout, name)!r} here"
            )
        if self.layout.dtype != layout.dtype and not convert_dtype:
            raise ValueError(
                f"dtype: keys and values are {self.layout.dtype} where the sequence comes from, {layout.dtype} here; "
                "set convert_dtype"
            )
        own = range(self.layout.first_kv_head, self.layout.first_kv_head + self.layout.num_kv_heads)
        wanted = range(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)
        if wanted.start < own.start or wanted.stop > own.stop:
            raise ValueError(
                f"num_kv_heads: heads {wanted.start} to {wanted.stop - 1} are wanted here, and the sequence has "
                f"{own.start} to {own.stop - 1}; join the states of all its ranks"
            )

    def put(self, kv: KvCache, blocks: Sequence[int]) -> None:
        """Writes the tokens' rows into blocks of a pool whose layout it fits; what else is in them stays as it is, or,
        between equal layouts, becomes what the state has there.
        """
        if self.layout == kv.layout:
            for block, content in zip(blocks, self.blocks, strict=False):
                kv.pool[block].copy_(content)
            return
        device = kv.pool.device
        with torch.cuda.device_of(kv.pool):
            transfer_tokens(
                self.blocks.to(device),
                self.layout.format,
                torch.arange(len(self.blocks), dtype=torch.int32, device=device),
                0,
                kv.pool,
                kv.layout.format,
                torch.tensor(blocks, dtype=torch.int32, device=device),
                0,
                self.num_tokens,
                source_head=kv.layout.first_kv_head - self.layout.first_kv_head,
            )

    def _planes(self) -> Tensor:
        """[blocks, layers * 2, heads, plane_bytes]"""
        layout = self.layout
        return self.blocks.view(len(self.blocks), layout.num_layers * 2, layout.num_kv_heads, layout.format.plane_bytes)
