"""The unembedding module against float64: the wanted rows, normalised, through the output layer."""

from __future__ import annotations

import pytest
import torch

from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, build_batch
from shared.config.modules import Norm, UnembedConfig
from shared.engine.modules import Unembed
from tests.shared.engine.modules.references import assert_near, norm, rounded

# the last row of one, every row of another, none of a third
BATCH = build_batch(
    [BatchEntry([1] * 5, 0, [1]), BatchEntry([1] * 3, 14, [2, 3], "all"), BatchEntry([1], 0, [4], "none")], 16
)
ROWS = [4, 5, 6, 7]


def config(norm_type: Norm | None, dtype: str = "float32", width: int = 40) -> UnembedConfig:
    return UnembedConfig.of(
        max_tokens=16, dtype=dtype, norm_type=norm_type, model_dim=width, max_sequences=3, vocab_size=51
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("width", [1, 40, 300])
def test_matches_float64(norm_type: Norm | None, dtype: str, width: int) -> None:
    torch.manual_seed(width)
    module = Unembed(config(norm_type, dtype, width), eps=1e-3)
    hidden, gamma, bias = rounded((9, width), dtype), rounded((width,), dtype), rounded((51,), dtype)
    beta = rounded((width,), dtype) if norm_type == "layer_norm" else None
    weight = rounded((51, width), dtype, width**-0.5)
    packed = module.transform_param(weight, bias)
    got = module(hidden, packed, BATCH, gamma=gamma if norm_type else None, beta=beta)

    x = hidden[torch.tensor(ROWS)].double()
    if norm_type:
        x = norm(x, norm_type, gamma, beta, 1e-3).to(DTYPES[dtype]).double()
    wanted = x @ weight.double().T + bias.double()
    assert got.dtype == DTYPES[dtype]
    assert_near(got, wanted, dtype)
    if norm_type is None:
        out = torch.empty(4, 51)
        assert module(hidden, packed, BATCH, out=out) is out
        assert_near(out, wanted, "float32")


def test_what_does_not_fit_is_refused_by_name() -> None:
    module, x = Unembed(config(None)), torch.ones(9, 40)
    weight = module.transform_param(torch.ones(51, 40))
    with pytest.raises(ValueError, match=r"param: is \[50, 40\], wanted \[51, 40\]"):
        module.transform_param(torch.ones(50, 40))
    with pytest.raises(ValueError, match="gamma, beta: are given, and the config's norm_type is none"):
        module(x, weight, BATCH, gamma=torch.ones(40))
    with pytest.raises(ValueError, match="gamma: is missing, and a rms_norm has one"):
        Unembed(config("rms_norm"))(x, weight, BATCH)
    with pytest.raises(ValueError, match=r"hidden_states: is torch\.float16, and the config's dtype is float32"):
        module(x.half(), weight, BATCH)
    four = build_batch([BatchEntry([1], 0, [1])] * 4, 16)
    with pytest.raises(ValueError, match="max_sequences: 4 sequences, and the module was made for 3"):
        module(torch.ones(4, 40), weight, four)
