"""The entries of one forward of the ragged engine, within its limits."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shared.batch import BatchEntry


class RaggedEntries:
    """max_tokens, max_sequences: of the forward."""

    def __init__(self, *, max_tokens: int, max_sequences: int) -> None:
        self._max_tokens, self._max_sequences = max_tokens, max_sequences
        self.entries: list[BatchEntry] = []
        self.num_tokens = 0

    def insert(self, token_ids: Sequence[int], start_position: int, blocks: Sequence[int]) -> None:
        """Adds tokens of a sequence, whose last one's logits are wanted. Raises RuntimeError at a limit."""
        if len(self.entries) == self._max_sequences:
            raise RuntimeError(f"Ragged batch is full due to sequence limit: {self._max_sequences}")
        if self.num_tokens + len(token_ids) > self._max_tokens:
            raise RuntimeError(f"Ragged batch is full due to capacity limit: {self._max_tokens}")
        self.entries.append(BatchEntry(token_ids, start_position, blocks))
        self.num_tokens += len(token_ids)


def checked_tokens(tokens: Iterable[Tensor | Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The tokens of each sequence: integers, or an integer tensor of any shape on the host.

    Raises RuntimeError for a tensor that is not on the host, ValueError for one without tokens, or with what is none.
    """
    checked: list[list[int]] = []
    for index, given in enumerate(tokens):
        if isinstance(given, Tensor):
            if given.device.type != "cpu":
                raise RuntimeError(f"Expected tokens to be on host but found device '{given.device}'")
            if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
                raise ValueError(f"tokens[{index}]: {given.dtype}, wants integers")
            given = given.flatten().tolist()
        try:
            token_ids = [operator.index(token_id) for token_id in given]
        except TypeError as error:
            raise ValueError(f"tokens[{index}]: wants integers: {error}") from error
        if not token_ids:
            raise ValueError(f"tokens[{index}]: has none; a sequence takes part with one at least")
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"tokens[{index}]: {wrong} is no token; this model has those from 0 to {vocab_size - 1}")
        checked.append(token_ids)
    return checked
