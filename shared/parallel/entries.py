"""The entries of a forward as bytes, for the ranks that compute it together.

int32, little-endian: number of entries; of each: wanted logits, start position, tokens, blocks; then the tokens of
all entries, then the blocks of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.batch import BatchEntry

_WANTS = ("none", "last", "all")
_COLUMNS = 4


def encode_entries(entries: Sequence[BatchEntry]) -> bytes:
    heads = [
        number
        for entry in entries
        for number in (
            _WANTS.index(entry.wants), entry.start_position, len(entry.token_ids), len(entry.block_table),
        )
    ]  # fmt: skip
    tokens = [token for entry in entries for token in entry.token_ids]
    blocks = [block for entry in entries for block in entry.block_table]
    return np.array([len(entries), *heads, *tokens, *blocks], dtype="<i4").tobytes()


def decode_entries(data: bytes) -> list[BatchEntry]:
    """Raises ValueError for bytes that are none of `encode_entries`."""
    if len(data) < 4 or len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no entries")
    numbers = np.frombuffer(data, dtype="<i4")
    count, rest = int(numbers[0]), numbers[1:]
    if not 0 <= count <= len(rest) // _COLUMNS:
        raise ValueError(f"{len(data)} bytes do not hold {count} entries")
    heads, rest = rest[: count * _COLUMNS].reshape(count, _COLUMNS), rest[count * _COLUMNS :].tolist()
    wants, starts, lengths, widths = heads.T.tolist()
    if min((*wants, *starts, *lengths, *widths), default=0) < 0 or max(wants, default=0) >= len(_WANTS):
        raise ValueError("an entry has a negative number, or wants what there is not")
    if sum(lengths) + sum(widths) != len(rest):
        raise ValueError(f"{len(rest)} numbers are not {sum(lengths)} tokens and {sum(widths)} blocks")
    entries: list[BatchEntry] = []
    token, block = 0, sum(lengths)
    for want, start, length, width in zip(wants, starts, lengths, widths, strict=True):
        tokens, blocks = rest[token : token + length], rest[block : block + width]
        entries.append(BatchEntry(tokens, start, blocks, _WANTS[want]))
        token, block = token + length, block + width
    return entries
