"""What a sequence's own tokens and its request do to the logits before the temperature: bias, penalties, min_tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.sampling_params import SamplingParams


class TokenHistory:
    """The distinct tokens of one sequence and how often each was generated, kept up to date token by token.

    A function of (tokens, num_prompt) alone: appending one by one and counting from scratch give the same.
    """

    def __init__(self, tokens: Iterable[int], num_prompt: int) -> None:
        """tokens: prompt and generated ones, in order; the first `num_prompt` are the prompt."""
        self.num_output = 0
        self._slots: dict[int, int] = {}
        self._token_ids = array("q")
        self._output_counts = array("q")
        tokens = tuple(tokens)
        if not 0 <= num_prompt <= len(tokens):
            raise ValueError(f"num_prompt {num_prompt} is not within the {len(tokens)} tokens given")
        for token_id in tokens[:num_prompt]:
            self._slot(token_id)
        for token_id in tokens[num_prompt:]:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Counts one generated token."""
        self._output_counts[self._slot(token_id)] += 1
        self.num_output += 1

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct token ids [distinct] int64, and how often each was generated [distinct] int64 (0: prompt only)."""
        return np.array(self._token_ids, dtype=np.int64), np.array(self._output_counts, dtype=np.int64)

    def _slot(self, token_id: int) -> int:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._token_ids):
            self._token_ids.append(token_id)
            self._output_counts.append(0)
        return slot


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sequence that samples in this step.

    index: which of the request's n samples; position: how many tokens it has generated already.
    history: needed where `params.penalized`, and then of all but the last `pending` tokens.
    """

    params: SamplingParams
    position: int
    index: int = 0
    eos_token_ids: Sequence[int] = ()
    history: TokenHistory | None = None
    pending: int = 0

    def __post_init__(self) -> None:
        if self.history is None:
            if self.params.penalized:
                raise ValueError("a row with penalties needs its token history")
        elif self.history.num_output + self.pending != self.position:
            raise ValueError(f"history of {self.history.num_output} generated tokens at position {self.position}")

    @classmethod
    def from_tokens(
        cls,
        params: SamplingParams,
        tokens: Sequence[int],
        num_prompt: int,
        index: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> SampleRow:
        """The row of a sequence known only by its tokens: prompt, then generated."""
        history = TokenHistory(tokens, num_prompt) if params.penalized else None
        return cls(params, len(tokens) - num_prompt, index, eos_token_ids, history)


def edit_logits(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """logits [rows, vocab] float32 -> the same tensor if no row asks for an edit, else an edited copy.

    Hugging Face's order: bias added; repetition penalty over prompt and generated tokens (x / r where x >= 0, else
    x * r); OpenAI's x - frequency * count - presence * [count > 0] over generated tokens; then the tokens that would
    end the sequence are masked while position < min_tokens.
    """
    vocab_size = logits.shape[1]
    biased = [(i, row) for i, row in enumerate(rows) if row.params.logit_bias]
    penalized = [(i, row.params, row.history) for i, row in enumerate(rows) if row.params.penalized and row.history]
    masked = [
        i * vocab_size + token_id
        for i, row in enumerate(rows)
        if row.position < row.params.min_tokens
        for token_id in row.params.ending_ids(row.eos_token_ids)
        if token_id < vocab_size
    ]
    if not (biased or penalized or masked):
        return logits
    edited = logits.clone(memory_format=torch.contiguous_format)
    # Every edit below gathers, computes and scatters single elements, so no row can touch another's bits.
    flat = edited.view(-1)
    if biased:
        entries = [(i * vocab_size + token_id, bias) for i, row in biased for token_id, bias in row.params.logit_bias]
        where = torch.tensor([element for element, _ in entries], device=logits.device)
        bias = torch.tensor([bias for _, bias in entries], dtype=torch.float32, device=logits.device)
        flat[where] = flat[where] + bias
    if penalized:
        _penalize(flat, vocab_size, penalized)
    if masked:
        flat[torch.tensor(masked, device=logits.device)] = float("-inf")
    return edited


def _penalize(flat: Tensor, vocab_size: int, rows: list[tuple[int, SamplingParams, TokenHistory]]) -> None:
    """flat [rows * vocab], changed in place. All rows' distinct tokens are handled as one list."""
    elements, counts, penalties = [], [], []
    for i, params, history in rows:
        token_ids, output_counts = history.counts()
        known = token_ids < vocab_size  # a prompt may hold an id the model embeds and never predicts
        elements.append(token_ids[known] + i * vocab_size)
        counts.append(output_counts[known])
        penalty = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        penalties.append(np.tile(np.array(penalty, dtype=np.float32), (len(elements[-1]), 1)))
    where = torch.from_numpy(np.concatenate(elements)).to(flat.device)
    count = torch.from_numpy(np.concatenate(counts)).to(flat.device)
    repetition, frequency, presence = torch.from_numpy(np.concatenate(penalties)).to(flat.device).unbind(1)
    score = flat[where]
    score = torch.where(score < 0, score * repetition, score / repetition)
    score = score - frequency * count
    flat[where] = score - presence * (count > 0)
