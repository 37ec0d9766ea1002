"""One step of an engine over parts of sequences: a forward, log-probabilities of prompts, one call of the sampler."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shared.engine import Engine
from shared.logprobs import InvalidLogits, TokenLogprobs, prompt_logprobs
from shared.penalties import SampleRow
from shared.sampling import Sampled, sample
from shared.sequence import Sequence


class Part(NamedTuple):
    """The next `num_tokens` tokens of a sequence."""

    sequence: Sequence
    num_tokens: int


@dataclass
class Outcome:
    """What a step brought a sequence."""

    sampled: list[Sampled] = field(default_factory=list)  # one for each of its indices, once its last token is computed
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt tokens after the computed ones
    error: Exception | None = None  # the logits define no distribution


def run_step(engine: Engine, parts: Ordered[Part]) -> list[Outcome]:
    """Computes the parts and moves their sequences' `num_computed` on; one outcome for each part."""
    entries = [sequence.entry(num_tokens) for sequence, num_tokens in parts]
    asked_of = [
        sequence.sample_rows(engine.plan.eos_token_ids) if sequence.remaining == num_tokens else []
        for sequence, num_tokens in parts
    ]
    drawn: Ordered[int | None] = [None] * len(parts)
    if all(len(entry.token_ids) == len(asked) == 1 for entry, asked in zip(entries, asked_of, strict=True)):
        drawn, logits = engine.step(entries, [row for [row] in asked_of])
    else:
        logits = engine.forward(entries)
    outcomes = [Outcome() for _ in parts]
    rows: list[int] = []
    samples: list[SampleRow] = []
    owners: list[Outcome] = []
    first = 0
    for (sequence, num_tokens), entry, asked, token, outcome in zip(
        parts, entries, asked_of, drawn, outcomes, strict=True
    ):
        num_rows = {"all": num_tokens, "last": 1, "none": 0}[entry.wants]
        if entry.wants == "all":
            _report_prompt(logits[first : first + num_rows], sequence, outcome)
        sequence.num_computed += num_tokens
        if token is not None:
            outcome.sampled, outcome.error = ([], InvalidLogits([first])) if token < 0 else ([Sampled(token)], None)
        else:
            samples += asked
            rows += [first + num_rows - 1] * len(asked)
            owners += [outcome] * len(asked)
        first += num_rows
    _sample(logits, rows, samples, owners)
    return outcomes


def _report_prompt(logits: Tensor, sequence: Sequence, outcome: Outcome) -> None:
    """logits [num_tokens, vocab] of the tokens from `num_computed` on; each predicts the token after it."""
    start = sequence.num_computed + 1
    targets = sequence.tokens[start : min(start + len(logits), sequence.request.num_prompt_tokens)]
    asked = sequence.request.params.prompt_logprobs
    try:
        outcome.prompt_logprobs = prompt_logprobs(
            logits[: len(targets)], torch.tensor(targets, device=logits.device), asked or 0
        )
    except InvalidLogits as error:
        outcome.error = error


def _sample(logits: Tensor, rows: list[int], samples: list[SampleRow], owners: list[Outcome]) -> None:
    """One call for all rows. Rows without a distribution fail alone: the others are sampled again, to the same bits."""
    while rows:
        plain = len(rows) == len(logits) and rows == list(range(len(rows)))
        try:
            sampled = sample(logits if plain else logits[torch.tensor(rows)], samples)
        except InvalidLogits as error:
            for row in error.rows:
                owners[row].error = error
            kept = [i for i in range(len(rows)) if i not in error.rows]
            rows, samples, owners = [rows[i] for i in kept], [samples[i] for i in kept], [owners[i] for i in kept]
            continue
        for owner, token in zip(owners, sampled, strict=True):
            owner.sampled.append(token)
        return
