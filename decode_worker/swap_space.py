"""Host memory for the blocks of preempted sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.kv_cache import KvCache


class SwapSpace:
    """Copies of blocks, `limit_bytes` at most."""

    def __init__(self, kv: KvCache, limit_bytes: int) -> None:
        self._kv = kv
        self._limit_bytes = limit_bytes
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def save(self, blocks: Sequence[int]) -> Tensor | None:
        """The blocks' bytes, uint8 [len(blocks), block_bytes] on the host, or None when there is no room for it."""
        num_bytes = len(blocks) * self._kv.block_bytes
        if self._used_bytes + num_bytes > self._limit_bytes:
            return None
        self._used_bytes += num_bytes
        return self._kv.pool[torch.tensor(blocks)].cpu()

    def restore(self, saved: Tensor, blocks: Sequence[int]) -> None:
        """Writes a copy back into the first of `blocks`, and drops it."""
        for block, content in zip(blocks, saved, strict=False):
            self._kv.pool[block].copy_(content)
        self.drop(saved)

    def drop(self, saved: Tensor) -> None:
        """Gives a copy's room back."""
        self._used_bytes -= saved.shape[0] * self._kv.block_bytes
