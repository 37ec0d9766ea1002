"""Reported log probabilities: log_softmax of the raw logits, ties by the lowest id, each row's bits its own."""

import pytest
import torch

from shared import logprobs
from shared.logprobs import InvalidLogits, prompt_logprobs, token_logprobs


def test_values_and_order():
    logits = torch.randn(7, 301, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.arange(7) * 3
    expected = torch.log_softmax(logits, dim=-1)
    best = logits.topk(5)
    for row, report in enumerate(prompt_logprobs(logits, targets, 5)):
        assert report.token_id == targets[row]
        assert report.logprob == expected[row, targets[row]].item()
        assert [token_id for token_id, _ in report.top] == best.indices[row].tolist()
        assert [value for _, value in report.top] == expected[row, best.indices[row]].tolist()


def test_ties_are_listed_by_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0, 2.0, 2.0], [0.0] * 7])
    first, second = token_logprobs(logits, torch.tensor([0, 6]), [5, 3])
    assert [token_id for token_id, _ in first.top] == [1, 3, 4, 5, 6]
    assert [token_id for token_id, _ in second.top] == [0, 1, 2]
    (tied,) = token_logprobs(logits[:1], torch.tensor([0]), [2])
    assert [token_id for token_id, _ in tied.top] == [1, 3]


def test_logits_that_log_softmax_rounds_together_keep_the_order_of_the_logits():
    logits = torch.tensor([[1e-8, 2e-8, 30.0]])
    (report,) = token_logprobs(logits, torch.tensor([2]), [3])
    assert report.top[1][1] == report.top[2][1]
    assert [token_id for token_id, _ in report.top] == [2, 1, 0]


def test_each_row_has_its_own_number_and_zero_reports_the_token_alone():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    reports = token_logprobs(logits, torch.tensor([1, 2, 3, 4]), [0, 3, 1, 60])
    assert [len(report.top) for report in reports] == [0, 3, 1, 50]


def test_chunks_and_neighbours_change_no_bit(monkeypatch):
    logits = torch.randn(37, 1003, generator=torch.Generator().manual_seed(2)) * 6
    targets = torch.arange(37)
    together = prompt_logprobs(logits, targets, 4)
    alone = [prompt_logprobs(logits[i : i + 1], targets[i : i + 1], 4)[0] for i in range(37)]
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 5 * 1003)
    assert together == alone == prompt_logprobs(logits, targets, 4)


def test_no_rows():
    assert prompt_logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 3) == []


def test_invalid_rows_are_named(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 20)
    logits = torch.zeros(5, 10)
    logits[3, 4] = torch.nan
    with pytest.raises(InvalidLogits) as error:
        prompt_logprobs(logits, torch.zeros(5, dtype=torch.int64), 2)
    assert error.value.rows == (3,)
