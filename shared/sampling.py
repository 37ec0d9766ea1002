"""The sampler of both workers: a pure function of (parameters, seed, token history, logits), row by row.

A row's token and logprobs are the same bits alone or in any batch, on any worker, with any number of threads:
every operation is elementwise, a softmax within one row, or exact. The draw is exact because probabilities become
integer weights first: integer sums below 2**53 are exact in float64, so the order of addition is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.logprobs import InvalidLogits, chunk_rows, token_logprobs
from shared.penalties import SampleRow, edit_logits
from shared.philox import token_uniforms
from shared.sampling_params import SamplingParams
from shared.truncation import integer_weights, truncate


class Sampled(NamedTuple):
    """One sampled token; logprob None and top empty unless the request asked (see shared/logprobs.py)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """The next token of each row. logits: [rows, vocab] float32, not changed.

    Order as Hugging Face's processors: bias, penalties, min_tokens (shared/penalties.py), temperature, top-k, top-p,
    min-p (shared/truncation.py), then one draw by inverse CDF in vocabulary order. Temperature 0 takes the highest
    logit, the lowest id on ties. Raises InvalidLogits, naming the rows whose logits define no distribution.
    """
    if logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"{len(rows)} rows need float32 logits of as many rows, got {logits.dtype} {logits.shape}")
    edited = edit_logits(logits, rows)
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    token_ids = [0] * len(rows)
    invalid: list[int] = []

    if greedy:
        # argmax returns the first of equal maxima, and a NaN before any number.
        picks = select_rows(edited, greedy).argmax(dim=-1)
        finite = edited[torch.tensor(greedy, device=logits.device), picks].isfinite()
        _place(greedy, picks, finite, token_ids, invalid)
    step = chunk_rows(logits.shape[1])
    for start in range(0, len(drawn), step):
        chunk = drawn[start : start + step]
        picks, valid = _draw(select_rows(edited, chunk), [rows[i] for i in chunk])
        _place(chunk, picks, valid, token_ids, invalid)
    if invalid:
        raise InvalidLogits(sorted(invalid))

    sampled = [Sampled(token_id) for token_id in token_ids]
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None]
    if asked:
        indices = [i for i, _ in asked]
        targets = torch.tensor([token_ids[i] for i in indices], device=logits.device)
        reports = token_logprobs(select_rows(logits, indices), targets, [k for _, k in asked])
        for i, report in zip(indices, reports, strict=True):
            sampled[i] = Sampled(*report)
    return sampled


def select_rows(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """The named rows, ascending; without a copy where they are consecutive."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return logits[indices[0] : indices[-1] + 1]
    return logits[torch.tensor(indices, device=logits.device)]


def filtered_probs(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What each row may draw: [rows, vocab] float32 probabilities, zero where removed, not scaled up to sum to 1 again.

    logits: [rows, vocab] float32, bias and penalties applied; params: one per row, temperatures above 0.
    """
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=logits.device)
    scores = logits / temperature[:, None]
    probs = torch.softmax(scores, dim=-1)
    truncate(scores, probs, params)
    return probs


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab], edited -> token ids [rows], and whether each row had a distribution to draw from [rows]."""
    params = [row.params for row in rows]
    cumulative = integer_weights(filtered_probs(logits, params)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniforms = token_uniforms(
        [p.seed for p in params], [row.index for row in rows], [row.position for row in rows], logits.device
    )
    # floor(u * total) is one of the integers 0 .. total - 1, and token i owns those from cumulative[i - 1] on.
    picks = torch.searchsorted(cumulative, (uniforms[:, None] * total).floor(), right=True)
    return picks.squeeze(1), total.squeeze(1) > 0


def _place(indices: list[int], picks: Tensor, valid: Tensor, token_ids: list[int], invalid: list[int]) -> None:
    """Puts the picks of rows `indices` into token_ids, and notes the rows that had no distribution."""
    for i, pick, is_valid in zip(indices, picks.tolist(), valid.tolist(), strict=True):
        token_ids[i] = pick
        if not is_valid:
            invalid.append(i)
