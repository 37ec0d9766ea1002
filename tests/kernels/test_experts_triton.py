"""Quantized experts in Triton: each form against float64, and the same bits for a pair, whatever is beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import device as where
from kernels.experts import ExpertWeights
from kernels.kv_format import quantize_rows, widen_rows
from kernels.linear import LinearWeight
from kernels.moe import grouped_linear, grouped_linear_reference, route
from kernels.quantization import Quantization

KINDS = pytest.mark.parametrize(
    "how",
    [
        Quantization(8, 12, symmetric=False),
        Quantization(8, dynamic=True),
        Quantization(4, symmetric=False),
        Quantization(6, 8, floating=True),
        pytest.param(Quantization(8), marks=pytest.mark.slow),
        pytest.param(Quantization(4, 24), marks=pytest.mark.slow),
        pytest.param(Quantization(4, 8, symmetric=False), marks=pytest.mark.slow),
        pytest.param(Quantization(8, floating=True), marks=pytest.mark.slow),
        pytest.param(Quantization(6, floating=True), marks=pytest.mark.slow),
    ],
    ids=lambda how: f"{how.form} {how.group}{' offsets' * (not how.symmetric)}{' dynamic' * how.dynamic}",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("interpreter")
    return "cpu"


def make(outputs: int, inputs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Weights and biases of 5 experts."""
    torch.manual_seed(outputs + inputs)
    weights = torch.randn(5, outputs, inputs) / inputs**0.5 + 0.02
    return weights.to(device, dtype), torch.randn(5, outputs).to(device, dtype)


def chosen(tokens: int, k: int, device: str) -> Tensor:
    """k different experts for each token, the last for none."""
    scores = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(tokens))
    scores[:, 4] -= 2
    return scores.argsort(1, descending=True)[:, :k].int().contiguous().to(device)


def multiplied(weight: LinearWeight) -> Tensor:
    """The numbers that are multiplied: of groups rounded to x's dtype."""
    made = weight.dequantize()
    grouped = weight.group != weight.in_features or weight.offset is not None
    return (made.to(weight.dtype) if grouped else made).double()


@DTYPES
@KINDS
@pytest.mark.parametrize(
    ("outputs", "inputs", "per_pair"), [(33, 72, True), pytest.param(70, 144, False, marks=pytest.mark.slow)]
)
def test_matches_the_reference(
    device: str, outputs: int, inputs: int, per_pair: bool, how: Quantization, dtype: torch.dtype
) -> None:
    plain, bias = make(outputs, inputs, dtype, device)
    weights = ExpertWeights(plain, 5, how, bias=bias)
    experts, pair_weights = chosen(23, 3, device), torch.rand(23, 3).to(device)
    x = torch.randn(23 * (3 if per_pair else 1), inputs).to(device, dtype)
    wide = widen_rows(*quantize_rows(x, "int8"), "int8") if how.dynamic else x
    numbers = torch.stack([multiplied(weights.expert(expert)) for expert in range(5)])
    pairs = experts.flatten().long()
    exact = grouped_linear_reference(wide.double(), numbers, experts) + bias.double()[pairs]
    for block_rows in (16, 64):
        y = grouped_linear(x, weights, route(experts, 5, block_rows), out=torch.full_like(exact, torch.nan).float())
        assert (y - exact).abs().amax() < 4e-6 * (1 + exact.abs().amax())
        scaled = grouped_linear(x, weights, route(experts, 5, block_rows), pair_weights=pair_weights)
        assert torch.equal(scaled, (y * pair_weights.view(-1, 1)).to(dtype))


@KINDS
def test_a_pair_keeps_its_bits_among_others(device: str, how: Quantization) -> None:
    plain, _ = make(40, 144, torch.bfloat16, device)
    weights, experts = ExpertWeights(plain, 5, how), chosen(20, 2, device)
    x = torch.randn(20, 144).to(device, torch.bfloat16)
    whole = grouped_linear(x, weights, route(experts, 5, 16)).unflatten(0, (20, 2))
    for rows in (1, 13):
        for part in (slice(rows), slice(20 - rows, 20)):
            y = grouped_linear(x[part], weights, route(experts[part].contiguous(), 5, 16))
            assert torch.equal(y.unflatten(0, (rows, 2)), whole[part]), rows


@KINDS
def test_a_pair_of_no_expert_is_left_alone(device: str, how: Quantization) -> None:
    plain, _ = make(33, 72, torch.bfloat16, device)
    weights = ExpertWeights(plain, 5, how)
    experts = torch.tensor([[0, -1], [5, 3], [1 << 30, -(1 << 31)]], dtype=torch.int32, device=device)
    x = torch.randn(3, 72).to(device, torch.bfloat16)
    out = torch.full((6, 33), 7.0, dtype=torch.bfloat16, device=device)
    grouped_linear(x, weights, route(experts, 5, 16), out=out)
    assert (out[[1, 2, 4, 5]] == 7).all()
    assert (out[[0, 3]] != 7).any(1).all()


@KINDS
def test_weights_come_back_from_their_tensors(device: str, how: Quantization) -> None:
    plain, bias = make(33, 72, torch.bfloat16, device)
    weights = ExpertWeights(plain, 5, how, bias=bias)
    again = ExpertWeights.from_tensors(weights.tensors(), plain.shape, plain.dtype)
    assert again.quantization == how
    assert again.description == weights.description
    routing, x = route(chosen(6, 2, device), 5, 16), torch.randn(6, 72).to(device, torch.bfloat16)
    assert torch.equal(grouped_linear(x, again, routing), grouped_linear(x, weights, routing))


@DTYPES
def test_integer_products_have_the_bits_of_c(
    interpreter: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, bias = make(40, 71, dtype, "cpu")
    experts, x = chosen(20, 2, "cpu"), torch.randn(20, 71).to(dtype)
    how = replace(Quantization(8), dynamic=True)
    of_triton = grouped_linear(x, ExpertWeights(plain, 5, how, bias=bias), route(experts, 5))
    monkeypatch.setattr(where, "INTERPRETED", False)
    assert torch.equal(grouped_linear(x, ExpertWeights(plain, 5, how, bias=bias), route(experts, 5)), of_triton)
