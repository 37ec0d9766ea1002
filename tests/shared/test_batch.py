"""Ragged batches: where each token goes."""

import pytest
import torch

from shared.batch import BatchEntry, build_batch


def test_mixed_batch() -> None:
    batch = build_batch(
        [
            BatchEntry([5, 6, 7], 0, [3]),
            BatchEntry([8], 6, [9, 2], "all"),
            BatchEntry([1, 2, 3, 4], 2, [4, 1], "none"),
            BatchEntry([10, 11], 3, [7, 8, 6], "all"),
        ],
        block_tokens=4,
    )
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 10, 11]
    assert batch.positions.tolist() == [0, 1, 2, 6, 2, 3, 4, 5, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 10]
    assert batch.context_lens.tolist() == [3, 7, 6, 5]
    assert batch.block_tables.tolist() == [[3, 0, 0], [9, 2, 0], [4, 1, 0], [7, 8, 6]]
    assert batch.slots.tolist() == [12, 13, 14, 10, 18, 19, 4, 5, 31, 32]
    assert batch.logit_rows.tolist() == [2, 3, 8, 9]
    assert (batch.num_tokens, batch.num_sequences) == (10, 4)
    assert batch.max_query_len == 4
    dtypes = {name: tensor.dtype for name, tensor in vars(batch).items() if isinstance(tensor, torch.Tensor)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.int64} == {"token_ids", "slots", "logit_rows"}
    assert {dtypes[name] for name in ("positions", "cu_seqlens", "context_lens", "block_tables")} == {torch.int32}


def test_empty_batch() -> None:
    batch = build_batch([], 16)
    assert (batch.num_tokens, batch.num_sequences) == (0, 0)
    assert batch.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (BatchEntry([], 0, [1]), "0 tokens from position 0"),
        (BatchEntry([1], -1, [1]), "from position -1"),
        (BatchEntry([1] * 5, 0, [1]), "1 blocks of 4 cannot hold 5 tokens"),
        (BatchEntry([1], 4, [1]), "1 blocks of 4 cannot hold 5 tokens"),
    ],
)
def test_refusals(entry: BatchEntry, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch([entry], 4)
