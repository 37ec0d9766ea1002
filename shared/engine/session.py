"""The sequences of a batch between two calls of a model: what of them is in the cache, and where.

A batch is a rectangle of tokens in which a mask says which are real; the engine knows ragged sequences alone. So of
each row the real tokens are fed, wherever padding stands, and their positions count from the row's first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from shared.batch import BatchEntry
from shared.block_allocator import BlockAllocator
from shared.engine.engine import Engine


class Pool:
    """An engine and who holds which of its blocks. It grows when a batch needs more than there are."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.allocator = BlockAllocator(engine.plan.num_blocks)

    def allocate(self, count: int) -> list[int]:
        if count > self.allocator.num_free:
            num_blocks = self.engine.plan.num_blocks + max(count, self.engine.plan.num_blocks // 2)
            self.engine.grow(num_blocks)
            self.allocator.grow(num_blocks)
        return self.allocator.allocate(count)


class Session:
    """Rows of a batch on their way, `max_tokens` of each at most. Its blocks are freed by `close`."""

    def __init__(self, pool: Pool, num_rows: int, max_tokens: int) -> None:
        self._pool, self.max_tokens = pool, max_tokens
        self.blocks: list[list[int]] = [[] for _ in range(num_rows)]
        # which of the columns fed so far hold a token, [rows, columns]
        self._real = torch.zeros(num_rows, 0, dtype=torch.bool)
        self._last: Tensor | None = None  # [rows, vocab] logits of each row's last token

    @property
    def columns(self) -> int:
        return self._real.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row in the cache."""
        return self._real.sum(1).tolist()

    def feed(self, token_ids: Tensor, mask: Tensor | None, wants: Literal["last", "all"]) -> Tensor:
        """Computes the next columns; float32 logits [rows, columns, vocab], or of the last column with wants "last".

        token_ids int64 [rows, columns]; mask [rows, columns so far and these], None: all of them are tokens. A column
        without a token has the logits of the last token before it, so that the last column always has the next token's;
        zeros where there is none. Raises ValueError for a batch or a mask that does not go on with this session's,
        RuntimeError for a row that gets too long; nothing was computed then.
        """
        real = self._real_columns(token_ids, mask)
        starts, counts = self.lengths, real.sum(1).tolist()
        longest = max((start + count for start, count in zip(starts, counts, strict=True)), default=0)
        if longest > self.max_tokens:
            raise RuntimeError(
                f"Input with size {longest} exceeds maximum length of {self.max_tokens}. Please increase max_tokens in "
                "the inference config."
            )
        self._extend([start + count for start, count in zip(starts, counts, strict=True)])
        ids = token_ids.cpu()
        rows = [row for row, count in enumerate(counts) if count]
        entries = [
            BatchEntry(
                ids[row][real[row]].tolist(), starts[row], self.blocks[row], "last" if wants == "last" else "all"
            )
            for row in rows
        ]
        computed = self._pool.engine.forward(entries) if entries else None
        self._real = torch.cat((self._real, real), 1)
        return self._rectangle(computed, rows, counts, real, wants)

    def check_positions(self, positions: Tensor, token_ids: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError unless they count the tokens of each row from its first one; of padding they may be any."""
        real = self._real_columns(token_ids, mask)
        counted = torch.tensor(self.lengths)[:, None] + real.cumsum(1) - 1
        if bool((positions.cpu().expand_as(counted) != counted)[real].any()):
            raise ValueError("position_ids: must count the tokens of a row from its first one on; leave them out")

    def crop(self, columns: int) -> None:
        """Forgets the columns behind the first ones. Their blocks stay."""
        if not 0 <= columns <= self.columns:
            raise ValueError(f"cannot keep {columns} of {self.columns} columns")
        self._real = self._real[:, :columns]
        self._last = None

    def close(self) -> None:
        """Frees the blocks."""
        for blocks in self.blocks:
            self._pool.allocator.free(blocks)
            blocks.clear()
        self._real = self._real[:, :0]

    def _real_columns(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        rows, columns = token_ids.shape
        if rows != len(self.blocks):
            raise ValueError(f"input_ids: {rows} rows, and the cache holds {len(self.blocks)}")
        if mask is None:
            return torch.ones(rows, columns, dtype=torch.bool)
        mask = mask.cpu().bool()
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (columns, self.columns + columns):
            raise ValueError(
                f"attention_mask: {list(mask.shape)}, wants [{rows}, {self.columns + columns}], one for each token in "
                "the cache and each new one"
            )
        if mask.shape[1] == columns and self.columns:
            return mask
        before, real = mask[:, : self.columns], mask[:, self.columns :]
        if not torch.equal(before, self._real):
            raise ValueError("attention_mask: differs from that of earlier calls for columns that are in the cache")
        return real

    def _extend(self, lengths: Sequence[int]) -> None:
        block_tokens = self._pool.engine.plan.layout.block_tokens
        missing = [-(-n // block_tokens) - len(own) for n, own in zip(lengths, self.blocks, strict=True)]
        fresh = self._pool.allocate(sum(max(count, 0) for count in missing))
        for own, count in zip(self.blocks, missing, strict=True):
            if count > 0:
                own += fresh[:count]
                del fresh[:count]

    def _rectangle(
        self, computed: Tensor | None, rows: list[int], counts: list[int], real: Tensor, wants: str
    ) -> Tensor:
        """Logits of tokens, back to back, laid out by row and column."""
        plan = self._pool.engine.plan
        vocab, num_rows = plan.architecture.vocab_size, len(self.blocks)
        if self._last is None:
            self._last = torch.zeros(num_rows, vocab, device=plan.device)
        if computed is None:
            width = 1 if wants == "last" else real.shape[1]
            return self._last[:, None].expand(-1, width, -1).clone()
        if wants == "last" or real.shape[1] == 1:
            last = self._last.clone()
            last[torch.tensor(rows, device=plan.device)] = computed
            self._last = last
            return last[:, None]
        if bool(real.all()):
            logits = computed.view(num_rows, -1, vocab)
            self._last = logits[:, -1].clone()
            return logits
        # of each column the number of tokens up to it: that one's logits are the column's
        upto = real.cumsum(1)
        firsts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        index = (firsts[:, None] + upto - 1).clamp(min=0).to(plan.device)
        logits = computed[index]
        before = (upto == 0).to(plan.device)
        logits = torch.where(before[..., None], self._last[:, None], logits)
        self._last = logits[:, -1].clone()
        return logits
