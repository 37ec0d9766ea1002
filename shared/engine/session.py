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
        self.columns = 0  # fed so far, padding too
        self.lengths = [0] * num_rows  # tokens of each row in the cache
        # which of the columns hold a token, [rows, columns]; None: all of them, and no step has to look at one
        self._real: Tensor | None = None
        self._last: Tensor | None = None  # [rows, vocab] logits of each row's last token
        self._is_closed = False

    @torch.inference_mode()
    def feed(self, token_ids: Tensor, mask: Tensor | None, wants: Literal["last", "all"]) -> Tensor:
        """Computes the next columns; float32 logits [rows, columns, vocab], or of the last column with wants "last".

        token_ids int64 [rows, columns]; mask [rows, columns so far and these], None: all of them are tokens. A column
        without a token has the logits of the last token before it, so that the last column always has the next token's;
        zeros where there is none. Raises ValueError for a batch or a mask that does not go on with this session's,
        RuntimeError for a row that gets too long or a session that is closed; nothing was computed then.
        """
        real = self._real_columns(token_ids, mask)
        width = token_ids.shape[1]
        counts = [width] * len(self.blocks) if real is None else real.sum(1).tolist()
        lengths = [start + count for start, count in zip(self.lengths, counts, strict=True)]
        longest = max(lengths, default=0)
        if longest > self.max_tokens:
            raise RuntimeError(too_long(longest, self.max_tokens, self._pool.engine.plan.architecture.max_context))
        rows = [row for row, count in enumerate(counts) if count]
        ids = self._ids(token_ids, real, rows)
        self._extend(lengths)
        entries = [
            BatchEntry(tokens, self.lengths[row], self.blocks[row], wants)
            for row, tokens in zip(rows, ids, strict=True)
        ]
        computed = self._pool.engine.forward(entries) if entries else None
        self._remember(real, width)
        self.lengths = lengths
        return self._rectangle(computed, rows, counts, real, width, wants)

    def check_positions(self, positions: Tensor, token_ids: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError unless they count the tokens of each row from its first one; of padding they may be any."""
        real = self._real_columns(token_ids, mask)
        if real is None:
            real = torch.ones(token_ids.shape, dtype=torch.bool)
        counted = torch.tensor(self.lengths)[:, None] + real.cumsum(1) - 1
        if positions.dim() != 2 or positions.shape[1] != counted.shape[1] or len(positions) not in (1, len(counted)):
            raise ValueError(f"position_ids: {list(positions.shape)}, wants one for each token, {list(counted.shape)}")
        if bool((positions.cpu().expand_as(counted) != counted)[real].any()):
            raise ValueError("position_ids: must count the tokens of a row from its first one on; leave them out")

    def crop(self, columns: int) -> None:
        """Forgets the columns behind the first ones. Their blocks stay."""
        if not 0 <= columns <= self.columns:
            raise ValueError(f"cannot keep {columns} of {self.columns} columns")
        if self._real is None:
            self.lengths = [columns] * len(self.lengths)
        else:
            self._real = self._real[:, :columns]
            self.lengths = self._real.sum(1).tolist()
        self.columns = columns
        self._last = None

    def close(self) -> None:
        """Frees the blocks; nothing can be fed any more."""
        for blocks in self.blocks:
            self._pool.allocator.free(blocks)
            blocks.clear()
        self._is_closed = True
        self._last = None

    def _real_columns(self, token_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which of the next columns hold a token; None: all of them, as all that went before."""
        if self._is_closed:
            raise RuntimeError(
                "past_key_values: their call of generate has ended, and its cache with it; give generate a cache that "
                "a call of the model returned, and that one stays"
            )
        rows, columns = token_ids.shape
        if rows != len(self.blocks):
            raise ValueError(f"input_ids: {rows} rows, and the cache holds {len(self.blocks)}")
        if mask is None:
            return None if self._real is None else torch.ones(rows, columns, dtype=torch.bool)
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (columns, self.columns + columns):
            raise ValueError(
                f"attention_mask: {list(mask.shape)}, wants [{rows}, {self.columns + columns}], one for each token in "
                "the cache and each new one"
            )
        mask = mask.cpu().bool()
        if mask.shape[1] == columns and self.columns:
            before, real = None, mask
        else:
            before, real = mask[:, : self.columns], mask[:, self.columns :]
        if before is not None and not (bool(before.all()) if self._real is None else torch.equal(before, self._real)):
            raise ValueError("attention_mask: differs from that of earlier calls for columns that are in the cache")
        return None if self._real is None and bool(real.all()) else real

    def _ids(self, token_ids: Tensor, real: Tensor | None, rows: list[int]) -> list[list[int]]:
        """Those of the tokens, of each of these rows."""
        on_host = token_ids.cpu()
        ids = [on_host[row].tolist() if real is None else on_host[row][real[row]].tolist() for row in rows]
        vocab_size = self._pool.engine.plan.architecture.vocab_size
        for tokens in ids:
            if min(tokens) < 0 or max(tokens) >= vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise ValueError(f"input_ids: {wrong} is no token; this model has those from 0 to {vocab_size - 1}")
        return ids

    def _remember(self, real: Tensor | None, columns: int) -> None:
        if real is not None:
            before = self._real
            if before is None:
                before = torch.ones(len(self.blocks), self.columns, dtype=torch.bool)
            self._real = torch.cat((before, real), 1)
        self.columns += columns

    def _extend(self, lengths: Sequence[int]) -> None:
        block_tokens = self._pool.engine.plan.layout.block_tokens
        missing = [-(-n // block_tokens) - len(own) for n, own in zip(lengths, self.blocks, strict=True)]
        needed = sum(max(count, 0) for count in missing)
        if not needed:
            return
        fresh = self._pool.allocate(needed)
        for own, count in zip(self.blocks, missing, strict=True):
            if count > 0:
                own += fresh[:count]
                del fresh[:count]

    def _rectangle(
        self, computed: Tensor | None, rows: list[int], counts: list[int], real: Tensor | None, width: int, wants: str
    ) -> Tensor:
        """Logits of tokens, back to back, by row and column. They are the caller's: nothing else keeps them."""
        plan = self._pool.engine.plan
        vocab, num_rows = plan.architecture.vocab_size, len(self.blocks)
        one_each = wants == "last" or width == 1
        if computed is not None and len(rows) == num_rows and one_each:
            self._last = computed.clone()  # the engine's next forward may overwrite them
            return computed.clone()[:, None]
        if self._last is None:
            self._last = torch.zeros(num_rows, vocab, device=plan.device)
        if computed is None:
            return self._last[:, None].repeat(1, 1 if wants == "last" else width, 1)
        if one_each:
            self._last[torch.tensor(rows, device=plan.device)] = computed
            return self._last[:, None].clone()
        if real is None or bool(real.all()):
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


def too_long(length: int, most: int, max_context: int) -> str:
    """What DeepSpeed says of a row of more than `most` tokens; where the model itself has no more, that."""
    remedy = "Please increase max_tokens in the DeepSpeed Inference Config."
    if most >= max_context:
        remedy = "The model has positions for no more: shorten the prompt, or ask for fewer tokens."
    return f"Input with size {length} exceeds maximum length of {most}. {remedy}"
