"""The flat inputs of one forward: sequences of any lengths, back to back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# Padding rows write their keys and values to this block, which no sequence ever owns.
NULL_BLOCK = 0


@dataclass(frozen=True)
class BatchEntry:
    """The part of one sequence that a forward computes.

    `token_ids` are the tokens at positions `start_position`, `start_position + 1`, …; those before are in the cache.
    `block_table` lists the sequence's blocks from position 0 on, and covers the last of these tokens.
    `wants`: of which tokens the logits are wanted.
    """

    token_ids: Sequence[int]
    start_position: int
    block_table: Sequence[int]
    wants: Literal["last", "all", "none"] = "last"


@dataclass(frozen=True)
class RaggedBatch:
    """One forward's inputs. Integers only; made on the CPU, moved by `to`."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int32, absolute position in its sequence
    cu_seqlens: Tensor  # [seqs + 1] int32, where each sequence's tokens start
    context_lens: Tensor  # [seqs] int32, tokens in the cache after this forward
    block_tables: Tensor  # [seqs, max_blocks] int32, rows filled up with the null block
    slots: Tensor  # [tokens] int64, block * block_tokens + offset where keys and values are written
    logit_rows: Tensor  # [n] int64, flat rows whose logits are wanted, in order
    max_query_len: int  # tokens of the longest entry

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]

    def to(self, device: torch.device | str) -> "RaggedBatch":
        """The same on a device; itself if it is there."""
        if self.token_ids.device == torch.device(device):
            return self
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def build_batch(entries: Sequence[BatchEntry], block_tokens: int) -> RaggedBatch:
    """Lays entries out flat, in their order. ValueError for an empty entry or a table too short for its tokens."""
    for index, entry in enumerate(entries):
        end = entry.start_position + len(entry.token_ids)
        if not entry.token_ids or entry.start_position < 0:
            raise ValueError(f"entry {index}: {len(entry.token_ids)} tokens from position {entry.start_position}")
        if end > len(entry.block_table) * block_tokens:
            raise ValueError(
                f"entry {index}: {len(entry.block_table)} blocks of {block_tokens} cannot hold {end} tokens"
            )
    lengths = np.array([len(entry.token_ids) for entry in entries], dtype=np.int32)
    starts = np.array([entry.start_position for entry in entries], dtype=np.int32)
    cu_seqlens = np.zeros(len(entries) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])

    width = max((len(entry.block_table) for entry in entries), default=0)
    tables = np.full((len(entries), width), NULL_BLOCK, dtype=np.int32)
    for row, entry in zip(tables, entries, strict=True):
        row[: len(entry.block_table)] = entry.block_table

    sequence_of = np.repeat(np.arange(len(entries)), lengths)
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) - cu_seqlens[sequence_of] + starts[sequence_of]
    blocks = tables[sequence_of, positions // block_tokens].astype(np.int64)
    return RaggedBatch(
        token_ids=torch.tensor([token for entry in entries for token in entry.token_ids], dtype=torch.int64),
        positions=torch.from_numpy(positions.astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        context_lens=torch.from_numpy(starts + lengths),
        block_tables=torch.from_numpy(tables),
        slots=torch.from_numpy(blocks * block_tokens + positions % block_tokens),
        logit_rows=torch.tensor(_logit_rows(entries, cu_seqlens), dtype=torch.int64),
        max_query_len=int(lengths.max(initial=0)),
    )


def _logit_rows(entries: Sequence[BatchEntry], cu_seqlens: np.ndarray) -> list[int]:
    rows: list[int] = []
    for index, entry in enumerate(entries):
        first, end = int(cu_seqlens[index]), int(cu_seqlens[index + 1])
        if entry.wants == "all":
            rows.extend(range(first, end))
        elif entry.wants == "last":
            rows.append(end - 1)
    return rows
