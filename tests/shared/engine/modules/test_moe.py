"""The mixture of experts against float64, which computes every expert for every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from kernels.quantization import Quantization
from shared.config.modules import MoeModuleConfig
from shared.engine.modules import Moe
from tests.shared.engine.modules.references import activation as activated
from tests.shared.engine.modules.references import assert_near, rounded

GATED = ("geglu", "reglu", "siglu")
WIDTH, INNER = 40, 24


def config(experts: int, top_k: int, activation: str = "siglu", dtype: str = "float32", **more: Any) -> MoeModuleConfig:
    return MoeModuleConfig(
        **{
            "max_tokens": 40,
            "model_dim": WIDTH,
            "intermediate_features": INNER,
            "n_experts": experts,
            "top_k": top_k,
            "input_dtype": dtype,
            "output_dtype": dtype,
            "activation": activation,
            **more,
        }
    )


def reference(config: MoeModuleConfig, x: Tensor, gate: Tensor, one: Tensor, two: Tensor, *biases: Tensor) -> Tensor:
    """float64; the gate's logits are rounded to the rows' dtype, and so is what the second linears read."""
    dtype = x.dtype
    logits = (x.double() @ gate.double().T).to(dtype).double()
    weights, chosen = logits.softmax(-1).topk(config.top_k)
    if config.normalize_scores:
        weights = weights / weights.sum(-1, keepdim=True)
    total = torch.zeros(len(x), WIDTH, dtype=torch.float64)
    for expert in range(config.n_experts):
        up = x.double() @ one[expert].double().T + (biases[0][expert].double() if biases else 0)
        inner = activated(up.to(dtype).double(), config.activation).to(dtype).double()
        y = inner @ two[expert].double().T + (biases[1][expert].double() if biases else 0)
        total += y * ((chosen == expert) * weights).sum(-1, keepdim=True)
    return total


def weights_of(config: MoeModuleConfig) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = config.input_dtype, INNER * (2 if config.activation in GATED else 1)
    return (
        rounded((config.n_experts, WIDTH), dtype),
        rounded((config.n_experts, rows, WIDTH), dtype, WIDTH**-0.5),
        rounded((config.n_experts, WIDTH, INNER), dtype, INNER**-0.5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "activation"),
    [(1, 1, 1, "siglu"), (33, 4, 2, "geglu"), (40, 9, 3, "gelu"), (7, 8, 8, "reglu"), (5, 6, 4, "identity")],
)
def test_matches_float64(rows: int, experts: int, top_k: int, activation: str, normalize: bool, dtype: str) -> None:
    torch.manual_seed(experts)
    made = config(experts, top_k, activation, dtype, normalize_scores=normalize)
    module = Moe(made)
    gate, one, two = weights_of(made)
    biases = rounded((experts, one.shape[1]), dtype), rounded((experts, WIDTH), dtype)
    x = rounded((rows, WIDTH), dtype)
    packed = module.transform_moe_mlp_1_param(one, biases[0]), module.transform_moe_mlp_2_param(two, biases[1])
    got = module(x, module.transform_gate_param(gate), *packed)
    assert (got.dtype, got.shape) == (DTYPES[dtype], (rows, WIDTH))
    assert_near(got, reference(made, x, gate, one, two, *biases), dtype)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_any_dtype(dtype: str, out: str) -> None:
    made = config(4, 2, "identity", dtype, output_dtype=out)
    module, (gate, one, two), x = Moe(made), weights_of(made), rounded((9, WIDTH), dtype)
    packed = module.transform_moe_mlp_1_param(one), module.transform_moe_mlp_2_param(two)
    got = module(x, module.transform_gate_param(gate), *packed)
    assert got.dtype == DTYPES[out]
    assert_near(got, reference(made, x, gate, one, two), max(dtype, out, key=("float32", "float16", "bfloat16").index))


def test_experts_whose_gated_rows_alternate_are_put_in_order() -> None:
    made = config(3, 2)
    module, (gate, one, two), x = Moe(made), weights_of(made), torch.randn(6, WIDTH)
    bias = torch.randn(3, 2 * INNER)
    alternating = one.unflatten(1, (2, INNER)).transpose(1, 2).flatten(1, 2)
    alternating_bias = bias.unflatten(1, (2, INNER)).transpose(1, 2).flatten(1, 2)
    router, second = module.transform_gate_param(gate), module.transform_moe_mlp_2_param(two)
    wanted = module(x, router, module.transform_moe_mlp_1_param(one, bias), second).clone()
    turned = module.transform_moe_mlp_1_param(alternating, alternating_bias, interleaved=True)
    assert torch.equal(module(x, router, turned, second), wanted)


def test_quantized_experts_and_scores_of_a_sigmoid() -> None:
    made = config(4, 2, "siglu")
    module, plain = Moe(made, scoring="sigmoid", quantization=Quantization(8)), Moe(made, scoring="sigmoid")
    (gate, one, two), x = weights_of(made), torch.randn(6, WIDTH)
    router = module.transform_gate_param(gate)
    packed = module.transform_moe_mlp_1_param(one), module.transform_moe_mlp_2_param(two)
    of_integers = [torch.stack([experts.expert(e).dequantize() for e in range(4)]) for experts in packed]
    same = plain.transform_moe_mlp_1_param(of_integers[0]), plain.transform_moe_mlp_2_param(of_integers[1])
    got = module(x, router, *packed)
    torch.testing.assert_close(got, plain(x, router, *same), rtol=1e-4, atol=1e-5)
    soft = Moe(made)
    assert not torch.allclose(got, soft(x, router, *packed))


def test_what_does_not_fit_is_refused_by_name() -> None:
    for top_k, experts in ((9, 16), (3, 2)):
        with pytest.raises(ValueError, match=f"top_k: {top_k} of {experts} experts"):
            Moe(config(experts, top_k))
    with pytest.raises(ValueError, match="n_experts: 257; the gate computes 256 at most"):
        Moe(config(257, 1))
    module = Moe(config(3, 2))
    gate, one, two = weights_of(config(3, 2))
    with pytest.raises(ValueError, match=r"gate_w: is \[2, 40\], wanted \[3, 40\]"):
        module.transform_gate_param(gate[:2])
    with pytest.raises(ValueError, match=r"mlp_1_w: an expert's is \[24, 40\], wanted \[48, 40\]"):
        module.transform_moe_mlp_1_param(one[:, :INNER])
    with pytest.raises(ValueError, match="weights of 3 experts, got 2"):
        module.transform_moe_mlp_2_param(two[:2])
    with pytest.raises(ValueError, match=r"mlp_1_b: is \[3, 24\], wanted \[3, 48\]"):
        module.transform_moe_mlp_1_param(one, torch.ones(3, INNER))
