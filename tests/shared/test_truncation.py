"""Top-k, top-p and min-p against Hugging Face's warpers and against exact integers in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared import truncation
from shared.sampling import filtered_probs
from shared.sampling_params import SamplingParams
from shared.truncation import integer_weights, truncate


def params_of(**changes) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=0, **changes)


def random_logits(rows: int, vocab_size: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def hugging_face(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The processed scores, in the order in which `generate` builds its list."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


COMBINATIONS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 7, "min_p": 0.2},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 100, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", COMBINATIONS, ids=str)
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 3.0), (0.6, 1.0), (1.9, 0.3)])
def test_keeps_what_hugging_face_keeps_with_its_probabilities(filters, temperature, scale):
    logits = random_logits(6, 3001, scale)
    params = params_of(temperature=temperature, **filters)
    expected = hugging_face(logits, params)
    probs = filtered_probs(logits, [params] * 6)
    assert torch.equal(probs > 0, expected.isfinite())
    torch.testing.assert_close(probs / probs.sum(dim=-1, keepdim=True), expected.softmax(dim=-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("filters", COMBINATIONS, ids=str)
def test_with_ties_as_many_of_each_score_stay_as_in_hugging_face(filters):
    # Which of equal scores stay at a top-p cut is left to an unstable sort there, so the scores are compared, not ids.
    logits = (random_logits(6, 700, 1.5) * 2).round() / 2
    params = params_of(**filters)
    expected = hugging_face(logits, params)
    probs = filtered_probs(logits, [params] * 6)
    for row in range(6):
        assert torch.equal(
            logits[row][probs[row] > 0].sort().values, expected[row][expected[row].isfinite()].sort().values
        )


def test_the_lowest_ids_stay_of_equal_scores_at_the_cut():
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    assert filtered_probs(logits, [params_of(top_p=1e-9)]).nonzero()[:, 1].tolist() == [1]  # what greedy takes
    assert filtered_probs(logits, [params_of(top_p=0.5)]).nonzero()[:, 1].tolist() == [1, 3, 4]
    assert filtered_probs(logits, [params_of(top_k=2)]).nonzero()[:, 1].tolist() == [1, 3, 4, 6]  # top-k keeps ties


def test_a_mass_of_exactly_p_is_enough():
    logits = torch.zeros(1, 4)
    assert filtered_probs(logits, [params_of(top_p=0.5)]).nonzero()[:, 1].tolist() == [0, 1]
    assert hugging_face(logits, params_of(top_p=0.5)).isfinite().sum() == 2


def exact(scores: list[float], probs: list[float], params: SamplingParams) -> set[int]:
    """The filters' definition, in integers without bound."""
    kept = set(range(len(scores)))
    if 0 < params.top_k < len(scores):
        kth = sorted(scores, reverse=True)[params.top_k - 1]
        kept = {i for i in kept if scores[i] >= kth}
    if params.top_p < 1:
        weights = [int(p * 2**48) for p in probs]
        total = sum(weights[i] for i in kept)
        above, head = 0, set()
        for i in sorted(kept, key=lambda i: (-probs[i], i)):
            if above < total - int((1 - params.top_p) * total) or not head:
                head.add(i)
            above += weights[i]
        kept = head
    if params.min_p > 0:
        limit = (torch.tensor(params.min_p) * max(probs)).item()
        kept = {i for i in kept if probs[i] >= limit}
    return kept


row_strategy = st.tuples(
    st.lists(st.integers(-60, 60).map(lambda x: x / 8), min_size=40, max_size=40),
    st.sampled_from([0, 1, 2, 7, 30, 40, 90]),
    st.sampled_from([1e-12, 0.1, 0.5, 0.9, 0.999999, 1.0]) | st.floats(0.001, 1),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(deadline=None)
@given(st.lists(row_strategy, min_size=1, max_size=6), st.sampled_from([1, 3, 512]))
def test_mixed_rows_equal_the_definition_by_either_way_to_the_cut(rows, head):
    scores = torch.tensor([scores for scores, _, _, _ in rows])
    params = [params_of(top_k=k, top_p=p, min_p=m) for _, k, p, m in rows]
    probs = scores.softmax(dim=-1)
    expected = [exact(scores[i].tolist(), probs[i].tolist(), params[i]) for i in range(len(rows))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "HEAD", head)  # below the nucleus' size the whole row is sorted
        kept = probs.clone()
        truncate(scores, kept, params)
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == expected
    assert torch.equal(kept[kept > 0], probs[kept > 0])


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_a_wide_nucleus_is_the_same_from_the_head_and_from_the_whole_row(scale, monkeypatch):
    logits = random_logits(4, 20_011, scale)
    params = [params_of(top_p=p) for p in (0.3, 0.7, 0.95, 0.9999)]
    first = filtered_probs(logits, params)
    for head in (1, 64, 20_011):
        monkeypatch.setattr(truncation, "HEAD", head)
        assert torch.equal(filtered_probs(logits, params), first)


def test_integer_weights_sum_exactly_in_any_order():
    probs = random_logits(3, 150_001, 2.0).softmax(dim=-1)
    weights = integer_weights(probs)
    order = torch.randperm(150_001, generator=torch.Generator().manual_seed(1))
    for row in weights:
        total = sum(map(int, row.tolist()))
        assert row.sum().item() == row[order].sum().item() == row.cumsum(0)[-1].item() == total
        assert abs(total / 2**48 - 1) < 1e-5
