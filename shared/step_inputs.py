"""What a decode step reads, at fixed places in one range of bytes: captured steps find it there, and one copy moves it.

A row is a sequence that computes one token. Its fields lie field by field, the widest numbers first, and the block
tables last, so that the first bytes are all that the first rows need.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shared.batch import NULL_BLOCK, BatchEntry, RaggedBatch

# name -> (dtype, numbers of a row)
_FIELDS: dict[str, tuple[torch.dtype, int]] = {
    "token_ids": (torch.int64, 1),
    "slots": (torch.int64, 1),
    "seeds": (torch.int64, 1),  # the bits of an unsigned number
    "draw_settings": (torch.float64, 4),  # kernels/sampling.py
    "positions": (torch.int32, 1),
    "context_lens": (torch.int32, 1),
    "output_indices": (torch.int32, 1),
    "output_positions": (torch.int32, 1),
    "sources": (torch.int32, 1),  # kernels/feed.py
    "count_slots": (torch.int32, 1),  # kernels/penalties.py; -1 = none
    "penalties": (torch.float32, 3),
}
# What fills a batch up: it attends to itself in the block that nobody owns.
PADDING = BatchEntry((0,), 0, (NULL_BLOCK,))


class StepInputs:
    """The inputs of up to `max_sequences` rows, on the host. table_width: blocks of the longest sequence.

    pinned: in memory that a CUDA device copies from by itself.
    """

    def __init__(self, max_sequences: int, block_tokens: int, table_width: int, *, pinned: bool = False) -> None:
        self.max_sequences, self.block_tokens, self.table_width = max_sequences, block_tokens, table_width
        self.memory = torch.zeros(self.num_bytes(max_sequences), dtype=torch.uint8, pin_memory=pinned)
        views = self.views(self.memory)
        self._arrays: dict[str, np.ndarray] = {name: view.numpy() for name, view in views.items()}
        self.seeds = self._arrays["seeds"].view(np.uint64)
        self._arrays["block_tables"][:] = NULL_BLOCK
        self._arrays["count_slots"][:] = self._arrays["sources"][:] = -1
        for row in range(max_sequences):
            self.set(row, PADDING)

    def num_bytes(self, rows: int) -> int:
        """Bytes from the first on that hold the inputs of so many rows."""
        fields = sum(dtype.itemsize * width for dtype, width in _FIELDS.values()) * self.max_sequences
        return -(-fields // 8) * 8 + 4 * rows * self.table_width

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The fields in such a range of bytes: [rows] or [rows, numbers of a row]."""
        found: dict[str, Tensor] = {}
        begin = 0
        for name, (dtype, width) in _FIELDS.items():
            end = begin + dtype.itemsize * width * self.max_sequences
            field = memory[begin:end].view(dtype)
            found[name] = field if width == 1 else field.view(self.max_sequences, width)
            begin = end
        tables = memory[self.num_bytes(0) :].view(torch.int32)
        return {**found, "block_tables": tables.view(self.max_sequences, self.table_width)}

    def set(self, row: int, entry: BatchEntry, source: int = -1) -> None:
        """source: kernels/feed.py. Raises ValueError for an entry of more than one token, or beyond its blocks."""
        position, blocks, arrays = entry.start_position, entry.block_table, self._arrays
        if len(entry.token_ids) != 1 or not 0 <= position < len(blocks) * self.block_tokens:
            raise ValueError(
                f"entry {row}: {len(entry.token_ids)} tokens from position {position} in {len(blocks)} blocks of "
                f"{self.block_tokens}; a step computes one token of each sequence"
            )
        arrays["token_ids"][row] = entry.token_ids[0]
        arrays["sources"][row] = source
        arrays["positions"][row] = position
        arrays["context_lens"][row] = position + 1
        slot = blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens
        arrays["slots"][row] = slot
        arrays["block_tables"][row, : len(blocks)] = blocks

    def set_draw(
        self,
        row: int,
        *,
        settings: tuple[float, float, float, float],
        seed: int = 0,
        index: int = 0,
        position: int = 0,
        penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
        count_slot: int = -1,
    ) -> None:
        """How the row's token is drawn: kernels/sampling.py, kernels/penalties.py."""
        arrays = self._arrays
        arrays["draw_settings"][row] = settings
        self.seeds[row] = seed
        arrays["output_indices"][row] = index
        arrays["output_positions"][row] = position
        arrays["penalties"][row] = penalties
        arrays["count_slots"][row] = count_slot


def step_batch(views: dict[str, Tensor], rows: int) -> RaggedBatch:
    """The first rows as a forward's batch, over the same memory. views: on any device."""
    device = views["token_ids"].device
    return RaggedBatch(
        token_ids=views["token_ids"][:rows],
        positions=views["positions"][:rows],
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens=views["context_lens"][:rows],
        block_tables=views["block_tables"][:rows],
        slots=views["slots"][:rows],
        logit_rows=torch.arange(rows, device=device),
        max_query_len=1,
    )
