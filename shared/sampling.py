"""The sampler of both workers: a pure function of (parameters, seed, token history, logits), row by row.

A row's token and logprobs are the same bits alone or in any batch, on any worker, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sampling import How, draw, token_uniforms
from shared.logprobs import InvalidLogits, token_logprobs
from shared.penalties import SampleRow, edit_logits


class Sampled(NamedTuple):
    """One sampled token; logprob None and top empty unless the request asked (see shared/logprobs.py)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """The next token of each row. logits: [rows, vocab] float32, not changed.

    Order as Hugging Face's processors: bias, penalties, min_tokens (shared/penalties.py), temperature, top-k, top-p,
    min-p, then one draw (kernels/sampling.py). Temperature 0 takes the highest logit, the lowest id on ties.
    Raises InvalidLogits, naming the rows whose logits define no distribution.
    """
    if logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"{len(rows)} rows need float32 logits of as many rows, got {logits.dtype} {logits.shape}")
    token_ids = draw(edit_logits(logits, rows), how_of(rows), _uniforms_of(rows))
    invalid = [i for i, token_id in enumerate(token_ids) if token_id < 0]
    if invalid:
        raise InvalidLogits(invalid)

    sampled = [Sampled(token_id) for token_id in token_ids]
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None]
    if asked:
        indices = [i for i, _ in asked]
        targets = torch.tensor([token_ids[i] for i in indices], device=logits.device)
        reports = token_logprobs(_select_rows(logits, indices), targets, [k for _, k in asked])
        for i, report in zip(indices, reports, strict=True):
            sampled[i] = Sampled(*report)
    return sampled


def sample_each(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | InvalidLogits]:
    """The same, where rows without a distribution fail alone: the others are sampled again, to the same bits."""
    try:
        return [*sample(logits, rows)]
    except InvalidLogits as error:
        results: list[Sampled | InvalidLogits] = [error] * len(rows)
        kept = [i for i in range(len(rows)) if i not in error.rows]
        if kept:
            again = sample_each(logits[torch.tensor(kept, device=logits.device)], [rows[i] for i in kept])
            for i, sampled in zip(kept, again, strict=True):
                results[i] = sampled
        return results


def _select_rows(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """The named rows, ascending; without a copy where they are consecutive."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return logits[indices[0] : indices[-1] + 1]
    return logits[torch.tensor(indices, device=logits.device)]


def how_of(rows: Sequence[SampleRow]) -> list[How]:
    """What `draw` is to do with each row."""
    return [How(p.temperature, p.top_k, p.top_p, p.min_p) for p in (row.params for row in rows)]


def _uniforms_of(rows: Sequence[SampleRow]) -> Sequence[float]:
    if all(row.params.greedy for row in rows):
        return [0.0] * len(rows)
    return token_uniforms((r.params.seed for r in rows), (r.index for r in rows), (r.position for r in rows))
