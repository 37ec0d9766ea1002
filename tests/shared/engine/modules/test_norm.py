"""The norms of the residual stream against float64, and what each leaves where."""

from __future__ import annotations

import pytest
import torch

from kernels.dtypes import DTYPES
from shared.config.modules import Norm, NormConfig
from shared.engine.modules import PostNorm, PreNorm
from tests.shared.engine.modules.references import assert_near, norm, rounded


def config(kind: Norm, channels: int, dtype: str = "float32", eps: float = 1e-5) -> NormConfig:
    return NormConfig.of(
        max_tokens=40,
        type=kind,
        channels=channels,
        residual_dtype=dtype,
        input_dtype=dtype,
        output_dtype=dtype,
        eps=eps,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (7, 33), (40, 576), (0, 8)])
def test_both_match_float64(kind: Norm, dtype: str, rows: int, channels: int) -> None:
    torch.manual_seed(rows)
    pre, post = PreNorm(config(kind, channels, dtype, 1e-3)), PostNorm(config(kind, channels, dtype, 1e-3))
    gamma, beta = rounded((channels,), dtype), rounded((channels,), dtype) if kind == "layer_norm" else None
    residual, x = rounded((rows, channels), dtype), rounded((rows, channels), dtype)
    total = (residual.double() + x.double()).to(DTYPES[dtype])

    same, hidden = pre(residual, None, gamma, beta)
    assert same is residual
    assert_near(hidden, norm(residual, kind, gamma, beta, 1e-3), dtype)

    stream = residual.clone()
    carried, hidden = pre(stream, x, gamma, beta)
    assert carried is stream
    assert torch.equal(stream, total)
    assert_near(hidden, norm(total, kind, gamma, beta, 1e-3), dtype)

    stream = residual.clone()
    carried, hidden = post(stream, x, gamma, beta)
    assert carried is hidden is stream
    assert_near(stream, norm(total, kind, gamma, beta, 1e-3), dtype)


def test_a_float32_gamma_is_kept_beside_narrow_rows() -> None:
    module = PreNorm(config("rms_norm", 16, "bfloat16"))
    gamma = module.transform_param(torch.full((16,), 1 + 2**-12))
    assert gamma.dtype == torch.float32
    assert module.transform_param(gamma.double()).dtype == torch.bfloat16
    module(rounded((3, 16), "bfloat16"), None, gamma)


@pytest.mark.parametrize("field", ["residual_dtype", "input_dtype", "output_dtype"])
def test_dtypes_that_differ_are_refused(field: str) -> None:
    values = config("layer_norm", 8).model_dump() | {field: "float16"}
    with pytest.raises(ValueError, match=r"(input|output)_dtype: float.., and residual_dtype is float"):
        PreNorm(NormConfig(**values))


def test_what_a_norm_has_not_is_refused() -> None:
    module, x = PostNorm(config("rms_norm", 8)), torch.ones(2, 8)
    with pytest.raises(ValueError, match="beta: is given, and an rms_norm has none"):
        module(x, x.clone(), torch.ones(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"residual: is torch\.bfloat16, and the config's residual_dtype is float32"):
        module(x.bfloat16(), x, torch.ones(8))
    with pytest.raises(ValueError, match=r"hidden_states: is torch\.bfloat16, and the config's input_dtype is float32"):
        module(x, x.bfloat16(), torch.ones(8))
