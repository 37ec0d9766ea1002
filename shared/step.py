"""One step of an engine over parts of sequences: a forward, log-probabilities of prompts, one call of the sampler."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shared.engine import Engine
from shared.logprobs import InvalidLogits, TokenLogprobs, prompt_logprobs
from shared.penalties import SampleRow
from shared.sampling import Sampled, sample_each
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


class Launched:
    """A step that a device works on, and draws the tokens of. Its sequences have one more pending."""

    def __init__(self, parts: Ordered[Part], wait: Callable[[], list[int]]) -> None:
        self.parts = parts
        self._wait = wait
        self._rows = {id(part.sequence): row for row, part in enumerate(parts)}

    def row_of(self, sequence: Sequence) -> int:
        """Where one of its sequences stands in the step. Raises KeyError for another."""
        return self._rows[id(sequence)]

    def collect(self) -> list[Outcome]:
        """Waits for the tokens; one outcome for each part."""
        tokens = self._wait()
        for part in self.parts:
            part.sequence.pending -= 1
        return [_drawn(token) for token in tokens]


def launch_step(engine: Engine, parts: Ordered[Part], before: Launched | None) -> Launched | None:
    """Begins a step of one token of each sequence, perhaps before the tokens of the one before are known.

    None, and nothing begun, for what only `run_step` does: then those tokens have to be known first.
    """
    if engine.launch is None:
        return None
    entries = [sequence.entry(num_tokens) for sequence, num_tokens in parts]
    rows: list[SampleRow] = []
    sources: list[int] = []
    for (sequence, num_tokens), entry in zip(parts, entries, strict=True):
        if num_tokens != 1 or entry.wants != "last" or len(sequence.indices) != 1:
            return None
        rows += sequence.sample_rows(engine.plan.eos_token_ids)
        sources.append(before.row_of(sequence) if before and sequence.pending else -1)
    wait = engine.launch(entries, rows, sources)
    if wait is None:
        return None
    for sequence, _ in parts:
        sequence.num_computed += 1
        sequence.pending += 1
    return Launched(parts, wait)


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
    outcomes = [Outcome() if token is None else _drawn(token) for token in drawn]
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
        if token is None:
            samples += asked
            rows += [first + num_rows - 1] * len(asked)
            owners += [outcome] * len(asked)
        first += num_rows
    _sample(logits, rows, samples, owners)
    return outcomes


def _drawn(token_id: int) -> Outcome:
    """What a device has drawn: -1 where the logits define no distribution."""
    return Outcome(error=InvalidLogits([0])) if token_id < 0 else Outcome([Sampled(token_id)])


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
    """One call for all rows."""
    if not rows:
        return
    plain = len(rows) == len(logits) and rows == list(range(len(rows)))
    chosen = logits if plain else logits[torch.tensor(rows)]
    for owner, sampled in zip(owners, sample_each(chosen, samples), strict=True):
        if isinstance(sampled, InvalidLogits):
            owner.error = sampled
        else:
            owner.sampled.append(sampled)
