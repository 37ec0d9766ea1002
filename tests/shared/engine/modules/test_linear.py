"""The linear module: every activation, dtype and order of a gated weight, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.dtypes import DTYPES
from kernels.quantization import Quantization
from shared.config.modules import LinearConfig
from shared.engine.modules import Linear
from tests.shared.engine.modules.references import activation as activated
from tests.shared.engine.modules.references import assert_near, rounded

ACTIVATIONS = ("identity", "gelu", "relu", "silu", "geglu", "reglu", "siglu")
GATED = ("geglu", "reglu", "siglu")


def config(
    inputs: int, outputs: int, activation: str = "identity", dtype: str = "float32", out: str = ""
) -> LinearConfig:
    return LinearConfig.of(
        max_tokens=40,
        in_channels=inputs,
        out_channels=outputs,
        activation=activation,
        input_dtype=dtype,
        output_dtype=out or dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (33, 300, 48), (40, 64, 1), (0, 8, 8)])
def test_matches_float64(activation: str, dtype: str, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    module = Linear(config(inputs, outputs, activation, dtype))
    width = outputs * (2 if activation in GATED else 1)
    x, bias = rounded((rows, inputs), dtype), rounded((width,), dtype)
    weight = rounded((width, inputs), dtype, inputs**-0.5)
    got = module(x, module.transform_param(weight, bias))
    assert (got.dtype, got.shape) == (DTYPES[dtype], (rows, outputs))
    assert_near(got, activated(x.double() @ weight.double().T + bias.double(), activation), dtype)


@pytest.mark.parametrize("activation", GATED)
def test_a_gated_weight_whose_rows_alternate_is_put_in_order(activation: str) -> None:
    module = Linear(config(24, 10, activation))
    x, gate, up = torch.randn(5, 24), torch.randn(10, 24), torch.randn(10, 24)
    gate_bias, up_bias = torch.randn(10), torch.randn(10)
    ordered = module.transform_param(torch.cat((gate, up)), torch.cat((gate_bias, up_bias)))
    wanted = module(x, ordered).clone()
    alternating = torch.stack((gate, up), 1).flatten(0, 1), torch.stack((gate_bias, up_bias), 1).flatten()
    assert torch.equal(module(x, module.transform_param(*alternating, interleaved=True)), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["identity", "silu", "siglu"])
def test_float32_results_of_narrow_inputs_are_not_rounded_before(activation: str, dtype: str) -> None:
    module = Linear(config(64, 24, activation, dtype, "float32"))
    x, weight = rounded((9, 64), dtype), rounded((24 * (1 + (activation in GATED)), 64), dtype, 0.1)
    got = module(x, module.transform_param(weight))
    assert got.dtype == torch.float32
    assert_near(got, activated(x.double() @ weight.double().T, activation), "float32")


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(8),
        Quantization(4, 32, symmetric=False),
        Quantization(8, floating=True),
        Quantization(6, floating=True),
    ],
    ids=["int8", "int4", "fp8", "fp6"],
)
def test_a_quantized_weight_is_multiplied_as_what_it_stands_for(quantization: Quantization) -> None:
    module = Linear(config(64, 24, "siglu"), quantization=quantization)
    x = torch.randn(9, 64)
    packed = module.transform_param(torch.randn(48, 64))
    assert packed.quantization == quantization
    assert_near(module(x, packed), activated(x.double() @ packed.dequantize().double().T, "siglu"), "float32")


def test_results_lie_where_they_always_do() -> None:
    module = Linear(config(8, 8))
    weight = module.transform_param(torch.eye(8))
    first = module(torch.ones(3, 8), weight)
    assert module(torch.zeros(40, 8), weight).data_ptr() == first.data_ptr()
    with pytest.raises(ValueError, match="blas_fp_linear: is given its own last result"):
        module(first, weight)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="output_dtype: bfloat16 from float16 is not computed; give it, or float32"):
        Linear(config(8, 8, dtype="float16", out="bfloat16"))
    assert not Linear.supports_config(config(8, 8, dtype="float32", out="float16"))
    module = Linear(config(8, 6, "geglu"))
    with pytest.raises(ValueError, match=r"weight: is \[6, 8\], wanted \[12, 8\]"):
        module.transform_param(torch.ones(6, 8))
    weight = module.transform_param(torch.ones(12, 8))
    with pytest.raises(ValueError, match=r"hidden_states: is torch\.float16, and the config's input_dtype is float32"):
        module(torch.ones(2, 8, dtype=torch.float16), weight)
    with pytest.raises(ValueError, match="max_tokens: 41 tokens, and the module was made for 40"):
        module(torch.ones(41, 8), weight)
