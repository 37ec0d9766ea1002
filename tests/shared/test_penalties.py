"""Token histories and logit edits: the same from scratch as token by token, and as Hugging Face computes them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from shared.penalties import SampleRow, TokenHistory, edit_logits
from shared.sampling_params import SamplingParams

VOCAB = 53
PLAIN = SamplingParams(max_tokens=100, seed=1)
PENALIZED = replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.2)
token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=60)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 5


@settings(deadline=None)
@given(token_lists, token_lists)
def test_appending_equals_counting_from_scratch(prompt, output):
    grown = TokenHistory(prompt, len(prompt))
    logits = logits_of(len(output))
    for position, token_id in enumerate(output):
        grown.append(token_id)
        tokens = prompt + output[: position + 1]
        incremental = edit_logits(logits, [SampleRow(PENALIZED, position + 1, history=grown)])
        scratch = edit_logits(logits, [SampleRow.from_tokens(PENALIZED, tokens, len(prompt))])
        assert torch.equal(incremental, scratch)
    assert grown.num_output == len(output)


@settings(deadline=None)
@given(token_lists, token_lists)
def test_penalties_follow_their_formula(prompt, output):
    logits = logits_of(3)
    edited = edit_logits(logits, [SampleRow.from_tokens(PENALIZED, prompt + output, len(prompt))])[0]
    for token_id in range(VOCAB):
        expected = logits[0, token_id].double().item()
        if token_id in prompt + output:
            expected = expected * 1.3 if expected < 0 else expected / 1.3
        expected -= -0.2 * output.count(token_id) + 0.7 * (token_id in output)
        assert edited[token_id].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_bias_repetition_and_min_tokens_equal_hugging_faces_bits():
    tokens, num_prompt, eos = [3, 3, 8, 1, 30, 8, 9], 4, (2, 7)
    params = replace(PLAIN, repetition_penalty=1.7, logit_bias=((3, -4.5), (7, 2.0), (50, 3.25)), min_tokens=4)
    logits = logits_of(5)
    input_ids = torch.tensor([tokens])
    expected = SequenceBiasLogitsProcessor({(i,): bias for i, bias in params.logit_bias})(input_ids, logits)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(input_ids, expected)
    expected = MinNewTokensLengthLogitsProcessor(num_prompt, 4, list(eos))(input_ids, expected)
    assert torch.equal(edit_logits(logits, [SampleRow.from_tokens(params, tokens, num_prompt, 0, eos)]), expected)


def test_min_tokens_holds_back_eos_and_stop_tokens_until_reached():
    params = replace(PLAIN, min_tokens=2, stop_token_ids=(11,))
    logits = logits_of(1)

    def masked(params: SamplingParams, position: int) -> list[int]:
        row = SampleRow(params, position, eos_token_ids=(2, VOCAB + 5))
        return edit_logits(logits, [row])[0].isinf().nonzero().flatten().tolist()

    assert masked(params, 0) == masked(params, 1) == [2, 11]
    assert masked(params, 2) == []
    assert masked(replace(params, ignore_eos=True), 0) == [11]  # eos would not end it, so nothing holds it back


def test_rows_are_edited_apart_and_the_input_is_left_alone():
    logits = logits_of(2, rows=4)
    before = logits.clone()
    rows = [
        SampleRow.from_tokens(PENALIZED, [1, 2, 3, 4], 2),
        SampleRow(PLAIN, 0),
        SampleRow(replace(PLAIN, logit_bias=((0, 9.0),)), 0),
        SampleRow.from_tokens(replace(PENALIZED, min_tokens=9), [1, VOCAB + 7, 1], 2, 0, (5,)),
    ]
    edited = edit_logits(logits, rows)
    assert torch.equal(logits, before)
    assert torch.equal(edited[1], logits[1])
    for i, row in enumerate(rows):
        assert torch.equal(edit_logits(logits[i : i + 1], [row])[0], edited[i])


def test_nothing_to_edit_copies_nothing():
    logits = logits_of(2, rows=2)
    assert edit_logits(logits, [SampleRow(PLAIN, 0), SampleRow(PLAIN, 5)]) is logits


def test_contradicting_histories_are_refused():
    with pytest.raises(ValueError, match="needs its token history"):
        SampleRow(PENALIZED, 0)
    with pytest.raises(ValueError, match="2 generated tokens at position 1"):
        SampleRow(PENALIZED, 1, history=TokenHistory([1, 2, 3], 1))
    with pytest.raises(ValueError, match="num_prompt 4"):
        TokenHistory([1, 2, 3], 4)
