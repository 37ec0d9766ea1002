"""Experts' packed weights, and their linears in C: the bits of one expert's linear, whatever rows are beside a row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from kernels import linear as linears
from kernels.activation import gated
from kernels.cpu.library import record
from kernels.experts import ExpertWeights
from kernels.kv_format import quantize_rows, widen_rows
from kernels.linear import LinearWeight, has_pairs, linear
from kernels.moe import (
    combine,
    grouped_linear,
    grouped_linear_reference,
    route,
    routing_size,
    top_k_gating,
)
from kernels.quantization import Integers, Quantization, quantize

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
HOW = (
    None,
    Quantization(8),
    Quantization(8, 8, symmetric=False),
    Quantization(4, 24),
    Quantization(4, symmetric=False),
    Quantization(8, 12, floating=True),
    Quantization(6, floating=True),
    Quantization(8, dynamic=True),
)


def form(how: Quantization | None) -> str:
    if how is None:
        return "plain"
    return f"{how.form} {how.group} {'symmetric' if how.symmetric else 'offsets'}{' dynamic' * how.dynamic}"


FORMS = pytest.mark.parametrize("how", HOW, ids=form)
# 71 and 9 are odd, and no whole words of int4; 288 is longer than a block of sums
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs", "how"),
    [
        pytest.param(outputs, inputs, how, id=f"{outputs}-{inputs}-{form(how)}")
        for outputs, inputs in ((33, 72), (100, 288), (7, 71), (1, 9))
        for how in HOW
        if how is None or inputs % (how.group or 1) == 0
    ],
)


def make(
    num_experts: int, outputs: int, inputs: int, dtype: torch.dtype, how: Quantization | None, *, biased: bool = False
) -> tuple[ExpertWeights, list[LinearWeight]]:
    """The experts together and each alone."""
    torch.manual_seed(outputs + inputs)
    weights = (torch.randn(num_experts, outputs, inputs) / inputs**0.5 + 0.02).to(dtype)
    bias = torch.randn(num_experts, outputs).to(dtype) if biased else None
    alone = [LinearWeight(w, None if bias is None else bias[e], how) for e, w in enumerate(weights)]
    return ExpertWeights(weights, num_experts, how, bias=bias), alone


def choose(tokens: int, num_experts: int, k: int) -> Tensor:
    """k different experts for each token; the last expert gets none if there is another, and the first every third."""
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, num_experts)
    scores[::3, 0] = 2
    scores[:, -1] -= 3 * (num_experts > k)
    return scores.argsort(1, descending=True)[:, :k].int().contiguous()


def one_by_one(x: Tensor, alone: list[LinearWeight], experts: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's rows through `linear`."""
    of_pair = experts.flatten()
    rows = x if len(x) == len(of_pair) else x.repeat_interleave(experts.shape[1], 0)
    y = torch.full((len(of_pair), alone[0].out_features), torch.nan, dtype=dtype)
    for expert, weight in enumerate(alone):
        pairs = (of_pair == expert).nonzero().flatten()
        y[pairs] = linear(rows[pairs], weight, out=torch.empty(len(pairs), weight.out_features, dtype=dtype))
    return y


@DTYPES
@SHAPES
def test_a_pair_has_the_bits_of_its_experts_linear(
    outputs: int, inputs: int, how: Quantization | None, dtype: torch.dtype
) -> None:
    weights, alone = make(9, outputs, inputs, dtype, how, biased=outputs == 33)
    for tokens, k in ((1, 1), (1, 8), (2, 3), (5, 2), (40, 4), (90, 7)):
        experts = choose(tokens, 9, k)
        for rows in (tokens, tokens * k):
            x = torch.randn(rows, inputs).to(dtype)
            for out_dtype in (dtype, torch.float32):
                out = torch.full((tokens * k, outputs), torch.nan, dtype=out_dtype)
                grouped_linear(x, weights, route(experts, 9), out=out)
                assert torch.equal(out, one_by_one(x, alone, experts, out_dtype)), (tokens, k, rows)


@DTYPES
@FORMS
def test_pair_weights_are_multiplied_in_before_rounding(how: Quantization | None, dtype: torch.dtype) -> None:
    weights, alone = make(5, 33, 72, dtype, how, biased=True)
    experts, pair_weights, x = choose(20, 5, 3), torch.rand(20, 3), torch.randn(20, 72).to(dtype)
    y = grouped_linear(x, weights, route(experts, 5), pair_weights=pair_weights)
    expected = one_by_one(x, alone, experts, torch.float32) * pair_weights.view(-1, 1)
    assert torch.equal(y, expected.to(dtype))


@DTYPES
@FORMS
def test_matches_the_reference_of_the_weights_that_it_stands_for(how: Quantization | None, dtype: torch.dtype) -> None:
    weights, alone = make(6, 40, 72, dtype, how)
    if how is None:
        torch.manual_seed(40 + 72)
        numbers = (torch.randn(6, 40, 72) / 72**0.5 + 0.02).to(dtype).double()
    else:
        numbers = torch.stack([weights.expert(expert).dequantize() for expert in range(6)]).double()
        assert torch.equal(numbers, torch.stack([weight.dequantize() for weight in alone]).double())
    experts, x = choose(30, 6, 2), torch.randn(30, 72).to(dtype)
    y = grouped_linear(x, weights, route(experts, 6), out=torch.empty(60, 40))
    if how and how.dynamic:
        x = widen_rows(*quantize_rows(x, "int8"), "int8")
    torch.testing.assert_close(y.double(), grouped_linear_reference(x.double(), numbers, experts), atol=2e-5, rtol=1e-5)


@DTYPES
@FORMS
def test_a_token_keeps_its_bits_among_others_and_on_any_number_of_threads(
    how: Quantization | None, dtype: torch.dtype
) -> None:
    weights, _ = make(8, 100, 288, dtype, how)
    experts, x = choose(130, 8, 2), torch.randn(130, 288).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = grouped_linear(x, weights, route(experts, 8)).unflatten(0, (130, 2))
        for threads, rows in product((1, 2, 5), (1, 2, 3, 8, 9, 17, 32, 100, 130)):
            torch.set_num_threads(threads)
            for part in (slice(rows), slice(130 - rows, 130)):
                y = grouped_linear(x[part], weights, route(experts[part].contiguous(), 8))
                assert torch.equal(y.unflatten(0, (rows, 2)), whole[part]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@DTYPES
@FORMS
def test_every_token_may_go_to_one_expert(how: Quantization | None, dtype: torch.dtype) -> None:
    weights, alone = make(4, 33, 72, dtype, how)
    for tokens in (1, 8, 9, 13, 241, 500):  # strips of rows in the linears end at 240
        x = torch.randn(tokens, 72).to(dtype)
        for expert in (0, 2, 3):
            routing = route(torch.full((tokens, 1), expert, dtype=torch.int32), 4)
            assert torch.equal(grouped_linear(x, weights, routing), linear(x, alone[expert])), (tokens, expert)


@FORMS
def test_a_pair_of_no_expert_is_left_alone(how: Quantization | None) -> None:
    weights, alone = make(4, 33, 72, torch.float32, how)
    experts = torch.tensor([[0, -1], [4, 3], [1 << 30, -(1 << 31)]], dtype=torch.int32)
    x, out = torch.randn(3, 72), torch.full((6, 33), 7.0)
    grouped_linear(x, weights, route(experts, 4), out=out)
    assert (out[[1, 2, 4, 5]] == 7).all()
    assert torch.equal(out[0], linear(x[:1], alone[0])[0])
    assert torch.equal(out[3], linear(x[1:2], alone[3])[0])


@pytest.mark.skipif(not has_pairs(torch.bfloat16), reason="this CPU has no dot products of bfloat16 pairs")
@FORMS
def test_panels_have_the_bits_of_their_linear_too(how: Quantization | None, monkeypatch: pytest.MonkeyPatch) -> None:
    of_pairs, _ = make(5, 33, 72, torch.bfloat16, how)
    monkeypatch.setattr(linears, "_cpu_has_pairs", lambda: False)
    of_panels, alone = make(5, 33, 72, torch.bfloat16, how)
    assert (of_panels.description == of_pairs.description) == bool(how and how.dynamic), "integers have no pairs"
    for tokens in (1, 4, 60):
        experts, x = choose(tokens, 5, 2), torch.randn(tokens, 72).bfloat16()
        y = grouped_linear(x, of_panels, route(experts, 5))
        assert torch.equal(y, one_by_one(x, alone, experts, torch.bfloat16))


@DTYPES
@FORMS
def test_a_layer_is_replayed_on_the_inputs_of_the_moment(how: Quantization | None, dtype: torch.dtype) -> None:
    tokens, num_experts, k, hidden, width = 6, 8, 2, 72, 48
    first, _ = make(num_experts, 2 * width, hidden, dtype, how)
    second, _ = make(num_experts, hidden, width, dtype, how)
    x, logits, gate = torch.zeros(tokens, hidden).to(dtype), torch.zeros(tokens, num_experts), torch.zeros(tokens, 1)
    weights, experts = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int32)
    memory = torch.empty(routing_size(tokens * k, num_experts), dtype=torch.int32)
    inner, active = (torch.empty(tokens * k, n, dtype=dtype) for n in (2 * width, width))
    y, out = torch.empty(tokens * k, hidden), torch.empty(tokens, hidden, dtype=dtype)

    def run() -> None:
        top_k_gating(logits, k, renormalize=True, weights_out=weights, experts_out=experts)
        routing = route(experts, num_experts, out=memory)
        gated(grouped_linear(x, first, routing, out=inner), "silu", out=active)
        grouped_linear(active, second, routing, pair_weights=weights, out=y)
        combine(y, k, shared=x, shared_gate=gate, out=out)

    with record() as replay:
        run()
    assert len(replay.calls) == 6
    torch.manual_seed(3)
    for spread in (0.0, 1.0, 3.0):  # of the experts chosen: at first the same for all tokens
        x.normal_()
        gate.normal_()
        logits.copy_(spread * torch.randn(tokens, num_experts))
        run()
        expected = out.clone()
        for part in (memory, out, y, inner):
            part.fill_(-5)
        replay()
        assert torch.equal(out, expected)


@DTYPES
@FORMS
def test_weights_come_back_from_their_tensors(how: Quantization | None, dtype: torch.dtype) -> None:
    weights, alone = make(3, 33, 72, dtype, how, biased=True)
    stored = weights.tensors()
    assert set(stored) <= set(ExpertWeights.FIELDS)
    again = ExpertWeights.from_tensors(stored, (3, 33, 72), dtype)
    assert again.packed.data_ptr() == weights.packed.data_ptr(), "over the same memory"
    assert (again.num_experts, again.out_features, again.in_features, again.dtype) == (3, 33, 72, dtype)
    assert again.quantization == weights.quantization == how
    assert again.description == f"3 experts of {alone[0].description}"
    assert again.num_bytes == weights.num_bytes == sum(weight.num_bytes for weight in alone)
    x, routing = torch.randn(4, 72).to(dtype), route(choose(4, 3, 2), 3)
    assert torch.equal(grouped_linear(x, again, routing), grouped_linear(x, weights, routing))
    for expert in range(3):
        assert torch.equal(linear(x, weights.expert(expert)), linear(x, alone[expert]))
    with pytest.raises(KeyError):
        ExpertWeights.from_tensors({}, (3, 33, 72), dtype)


def test_weights_that_come_quantized_are_as_those_quantized_here() -> None:
    how = Quantization(4, 24, symmetric=False)
    plain = torch.randn(3, 33, 72).bfloat16()
    parts = (quantize(weight, how) for weight in plain)
    bias = torch.randn(3, 33).bfloat16()
    weights = ExpertWeights.of_integers((Integers(4, *part) for part in parts), 3, torch.bfloat16, bias=bias)
    expected = ExpertWeights(plain, 3, how, bias=bias)
    assert weights.quantization == how
    assert weights.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(weights.tensors()[field], part) for field, part in expected.tensors().items())


@FORMS
def test_a_generators_weights_are_never_all_in_memory(how: Quantization | None) -> None:
    made: list[weakref.ref[Tensor]] = []

    def weights() -> Iterator[Tensor]:
        for _ in range(5):
            assert not any(one() is not None for one in made[:-1]), "those before the last are packed, and still held"
            weight = torch.randn(33, 72)
            made.append(weakref.ref(weight))
            yield weight
            del weight

    ExpertWeights(weights(), 5, how)
    assert len(made) == 5


def test_broken_contracts_are_refused() -> None:
    weight = torch.randn(8, 16)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        ExpertWeights([], 0)
    with pytest.raises(ValueError, match="there must be weights of 3 experts, got 2"):
        ExpertWeights([weight, weight], 3)
    with pytest.raises(ValueError, match="there must be weights of 2 experts, got more"):
        ExpertWeights([weight] * 3, 2)
    for other in (weight[:7], weight[:, :15], weight.bfloat16()):
        with pytest.raises(ValueError, match="must be alike, up to expert 1"):
            ExpertWeights([weight, other], 2)
    with pytest.raises(ValueError, match="weight must be float32, bfloat16 or float16"):
        ExpertWeights([weight.double()], 1)
    with pytest.raises(ValueError, match="cannot be cut into groups of 24"):
        ExpertWeights([weight], 1, Quantization(4, 24))
    for bias in (torch.zeros(8), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match=r"bias must be of 2 experts, \[experts, out\]"):
            ExpertWeights([weight, weight], 2, bias=bias)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[8\]"):
        ExpertWeights([weight, weight], 2, bias=torch.zeros(2, 7))
