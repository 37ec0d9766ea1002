"""The embedding module against float64: positions, token types and the norm of what they add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, build_batch
from shared.config.modules import EmbeddingsConfig
from shared.engine.modules import Embedding
from tests.shared.engine.modules.references import assert_near, norm, rounded

# two sequences, one of them continued at a block's end
BATCH = build_batch([BatchEntry([3, 1, 4, 1, 5], 0, [2, 4]), BatchEntry([9, 2, 6], 15, [1, 3])], 16)
POSITIONS = [0, 1, 2, 3, 4, 15, 16, 17]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("output_norm", [None, "layer_norm", "rms_norm"])
def test_matches_float64(positional: bool, typed: bool, output_norm: Any, dtype: str) -> None:
    torch.manual_seed(0)
    width = 37
    module = Embedding(
        EmbeddingsConfig(
            max_tokens=8,
            residual_dtype=dtype,
            embedding_dim=width,
            positional_embedding=positional,
            positional_offset=2 if positional else 0,
            use_token_type=typed,
            output_normalization=output_norm,
        ),
        eps=1e-3,
    )
    words, places, kinds = (module.transform_param(torch.randn(rows, width)) for rows in (11, 20, 2))
    types = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1])
    gamma, beta = rounded((width,), dtype), rounded((width,), dtype) if output_norm == "layer_norm" else None
    parts: dict[str, Any] = {"position_embeddings": places} if positional else {}
    parts |= {"token_type_ids": types, "token_type_embeddings": kinds} if typed else {}
    parts |= {"gamma": gamma, "beta": beta} if output_norm else {}
    got = module(BATCH, words, **parts)

    wanted = words.double()[BATCH.token_ids]
    if positional:
        wanted = wanted + places.double()[torch.tensor(POSITIONS) + 2]
    if typed:
        wanted = wanted + kinds.double()[types]
    if output_norm:
        wanted = norm(wanted.to(DTYPES[dtype]), output_norm, gamma, beta, 1e-3)
    assert got.dtype == DTYPES[dtype]
    assert_near(got, wanted, dtype)


def test_parts_that_the_config_has_not_are_refused_and_those_that_it_has_are_asked_for() -> None:
    plain = Embedding(EmbeddingsConfig(max_tokens=8, embedding_dim=8))
    words = plain.transform_param(torch.randn(11, 8))
    assert words.dtype == torch.float16
    for part in ("position_embeddings", "token_type_ids", "token_type_embeddings", "gamma", "beta"):
        with pytest.raises(ValueError, match=f"{part}: is given, and the config's"):
            plain(BATCH, words, **{part: torch.ones(8, 8)})
    whole = Embedding(
        EmbeddingsConfig(
            max_tokens=8,
            embedding_dim=8,
            positional_embedding=True,
            use_token_type=True,
            output_normalization="rms_norm",
        )
    )
    words = torch.cat((words, words))  # of 18 positions, too
    given: dict[str, Any] = {
        "position_embeddings": words,
        "token_type_ids": torch.zeros(8, dtype=torch.int64),
        "token_type_embeddings": words,
        "gamma": torch.ones(8),
    }
    assert whole(BATCH, words, **given).shape == (8, 8)
    for part in given:
        with pytest.raises(ValueError, match=f"{part}: is missing"):
            whole(BATCH, words, **{name: value for name, value in given.items() if name != part})


def test_an_offset_without_positions_and_more_tokens_than_there_is_memory_for_are_refused() -> None:
    with pytest.raises(ValueError, match="positional_offset: 2, and positional_embedding is false"):
        Embedding(EmbeddingsConfig(max_tokens=8, embedding_dim=8, positional_offset=2))
    module = Embedding(EmbeddingsConfig(max_tokens=7, embedding_dim=8))
    with pytest.raises(ValueError, match="max_tokens: 8 tokens, and the module was made for 7"):
        module(BATCH, torch.ones(11, 8, dtype=torch.float16))
