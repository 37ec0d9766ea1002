"""Penalties on the device against the CPU's, bit for bit; counts against the references."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kernels.penalties import (
    IN_PROMPT,
    count_tokens,
    count_tokens_reference,
    counts_of,
    edit_tokens,
    edit_tokens_reference,
)
from shared.penalties import SampleRow, TokenHistory, edit_logits
from shared.sampling_params import SamplingParams

TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
PENALTIES = [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (0.8, 1.1, 0.3), (1.0, 0.0, 0.0), (1.7, -0.2, 1e6)]


def sequence(vocab_size: int, seed: int) -> tuple[list[int], int]:
    """Tokens, some of them many times and one beyond the vocabulary; how many are the prompt."""
    chance = random.Random(seed)
    tokens = [chance.randrange(min(vocab_size, 3 + 40 * (i % 2))) for i in range(60)]
    tokens[7] = vocab_size
    return tokens, 10 + seed


@TRITON
@pytest.mark.parametrize(
    "vocab_size", [1, 2, 100, 1000, 4096, 4099, *(pytest.param(v, marks=pytest.mark.slow) for v in (49_152, 128_256))]
)
def test_penalties_are_those_of_the_cpu(on: str, vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    rows = len(PENALTIES)
    wide = 3 * torch.randn(rows, vocab_size + 4)
    wide[:, 0], wide[1, : vocab_size // 2] = -0.0, -torch.inf
    logits = wide[:, :vocab_size]
    sequences = [sequence(vocab_size, i) for i in range(rows)]
    sampled = [
        SampleRow(
            SamplingParams(max_tokens=99, seed=0, repetition_penalty=r, frequency_penalty=f, presence_penalty=p),
            len(tokens) - num_prompt,
            history=TokenHistory(tokens, num_prompt),
        )
        for (r, f, p), (tokens, num_prompt) in zip(PENALTIES, sequences, strict=True)
    ]
    expected = edit_logits(logits.contiguous(), sampled)

    slots = torch.tensor([5, 0, 7, 2, 1, 4])
    counts = torch.full((8, vocab_size), -1, dtype=torch.int32)
    for slot, (tokens, num_prompt) in zip(slots, sequences, strict=True):
        counts[slot] = counts_of(tokens, num_prompt, vocab_size)
    before = counts.clone()
    settings = torch.tensor(PENALTIES)
    assert torch.equal(edit_tokens_reference(logits, slots, counts, settings), expected)

    on_device = wide.to(on, copy=True)
    view = on_device[:, :vocab_size]
    assert edit_tokens(view, slots.to(on), counts.to(on), settings.to(on)) is view
    assert_same_bits(view.cpu(), expected)
    assert torch.equal(on_device[:, vocab_size:].cpu(), wide[:, vocab_size:])
    assert torch.equal(counts, before)
    # alone, of either type of slot
    for i in range(rows):
        row = logits[i : i + 1].to(on, copy=True)
        edit_tokens(row, slots[i : i + 1].to(on, torch.int32), counts.to(on), settings[i : i + 1].to(on))
        assert_same_bits(row.cpu(), expected[i : i + 1])


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    assert torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


@TRITON
def test_rows_without_penalties_or_a_slot_are_left_alone(on: str) -> None:
    logits = torch.randn(4, 50)
    logits[2] = torch.nan
    counts = torch.full((3, 50), IN_PROMPT + 2, dtype=torch.int32)
    settings = torch.tensor([(1.0, 0.0, 0.0), (2.0, 1.0, 1.0), (1.0, 0.0, 0.0), (2.0, 1.0, 1.0)])
    slots = torch.tensor([0, -1, 1, 3])
    edited = edit_tokens(logits.to(on, copy=True), slots.to(on), counts.to(on), settings.to(on))
    assert_same_bits(edited.cpu(), logits)
    assert_same_bits(edit_tokens_reference(logits, slots, counts, settings), logits)


@TRITON
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (5, 7), (200, 33)])
def test_one_more_of_each_token_is_counted(on: str, rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    counts = IN_PROMPT * torch.randint(2, (rows + 3, vocab_size), dtype=torch.int32)
    slots = torch.randperm(rows + 3)[:rows].to(dtype)
    tokens = torch.randint(-1, vocab_size + 1, (rows,))
    expected = counts
    on_device = counts.to(on, copy=True)
    for shift in range(3):
        moved = tokens.roll(shift)
        expected = count_tokens_reference(expected, slots, moved)
        assert count_tokens(on_device, slots.to(on), moved.to(on)) is on_device
    assert torch.equal(on_device.cpu(), expected)


@TRITON
def test_rows_without_a_slot_are_not_counted(on: str) -> None:
    counts = torch.zeros(2, 5, dtype=torch.int32, device=on)
    count_tokens(counts, torch.tensor([-1, 2, 1], device=on), torch.tensor([1, 1, 4], device=on))
    assert counts.tolist() == [[0] * 5, [0, 0, 0, 0, 1]]


@TRITON
def test_counting_token_by_token_is_counting_at_once(on: str) -> None:
    tokens, num_prompt = sequence(40, 3)
    counts = torch.stack([counts_of(tokens[:num_prompt], num_prompt, 40)]).to(on)
    for token in tokens[num_prompt:]:
        count_tokens(counts, torch.zeros(1, dtype=torch.int64, device=on), torch.tensor([token], device=on))
    assert torch.equal(counts[0].cpu(), counts_of(tokens, num_prompt, 40))


def test_counts_tell_the_prompt_from_what_was_generated() -> None:
    assert counts_of([1, 1, 9, 3, 3, 1, 4], 3, 5).tolist() == [0, IN_PROMPT + 1, 0, 2, 1]
    assert counts_of([], 0, 2).tolist() == [0, 0]


@TRITON
def test_no_rows_are_no_work(on: str) -> None:
    none, counts = torch.empty(0, dtype=torch.int64, device=on), torch.zeros(1, 5, dtype=torch.int32, device=on)
    logits = torch.empty(0, 5, device=on)
    assert edit_tokens(logits, none, counts, torch.empty(0, 3, device=on)).shape == (0, 5)
    assert not count_tokens(counts, none, none).any()


def test_broken_contracts_are_refused(interpreter: None) -> None:
    logits, slots, settings = torch.zeros(2, 5), torch.zeros(2).long(), torch.ones(2, 3)
    counts = torch.zeros(4, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="logits must be float32"):
        edit_tokens(logits.bfloat16(), slots, counts, settings)
    with pytest.raises(ValueError, match="counts must be contiguous int32"):
        edit_tokens(logits, slots, counts.long(), settings)
    with pytest.raises(ValueError, match="counts must be of the 5 tokens"):
        edit_tokens(logits, slots, counts[:, :4].contiguous(), settings)
    with pytest.raises(ValueError, match="slots must be"):
        edit_tokens(logits, slots[:1], counts, settings)
    with pytest.raises(ValueError, match="settings must be"):
        edit_tokens(logits, slots, counts, settings.double())
    with pytest.raises(ValueError, match="tokens must be"):
        count_tokens(counts, slots, slots.int())
    with pytest.raises(ValueError, match="slots must be"):
        count_tokens(counts, slots.float(), slots)


def test_tensors_of_the_cpu_are_refused_without_triton() -> None:
    counts, numbers = torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1).long()
    with pytest.raises(ValueError, match="edit_tokens runs on: cuda"):
        edit_tokens(torch.zeros(1, 5), numbers, counts, torch.ones(1, 3))
    with pytest.raises(ValueError, match="count_tokens runs on: cuda"):
        count_tokens(counts, numbers, numbers)
