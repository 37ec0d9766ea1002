"""Mixture of experts against its float64 references, and the same bits for a token among any others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.experts import ExpertWeights
from kernels.moe import (
    BLOCK_ROWS,
    Routing,
    combine,
    combine_reference,
    grouped_linear,
    grouped_linear_reference,
    route,
    route_reference,
    routing_size,
    top_k_gating,
    top_k_gating_reference,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
CASES = pytest.mark.parametrize(
    ("tokens", "num_experts", "k"),
    [
        (1, 60, 8),
        (2, 4, 1),
        (17, 4, 4),
        (17, 60, 4),
        (64, 8, 2),
        *(pytest.param(130, n, k, marks=pytest.mark.slow) for n, k in ((4, 1), (8, 2), (8, 8), (60, 4), (60, 8))),
    ],
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def random_experts(tokens: int, num_experts: int, k: int) -> Tensor:
    """k different ones for each token."""
    torch.manual_seed(tokens * num_experts + k)
    return torch.rand(tokens, num_experts).argsort(1)[:, :k].int().contiguous()


def packed(weight: Tensor) -> ExpertWeights:
    """[experts, out, in] for the ops."""
    return ExpertWeights(weight, len(weight))


def poisoned(experts: Tensor, num_experts: int, block_rows: int = BLOCK_ROWS) -> Tensor:
    size = routing_size(experts.numel(), num_experts, block_rows)
    return torch.full((size,), 1 << 30, dtype=torch.int32, device=experts.device)


@DTYPES
@CASES
def test_gating_matches_the_reference(on: str, tokens: int, num_experts: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens + num_experts)
    logits = (3 * torch.randn(tokens, num_experts)).to(on, dtype)
    weights_out = torch.full((tokens, k), torch.nan, device=on)
    experts_out = torch.full((tokens, k), 1 << 30, dtype=torch.int32, device=on)
    renormalize = tokens % 2 == 0
    found = top_k_gating(logits, k, renormalize=renormalize, weights_out=weights_out, experts_out=experts_out)
    assert found[0] is weights_out
    assert found[1] is experts_out
    weights, experts = top_k_gating_reference(logits.double(), k, renormalize=renormalize)
    assert torch.equal(experts_out, experts)
    torch.testing.assert_close(weights_out.double(), weights, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 3), (256, 8)])
def test_gating_scores(on: str, num_experts: int, k: int, scoring: Any, renormalize: bool) -> None:
    torch.manual_seed(num_experts)
    logits = (5 * torch.randn(3, num_experts)).to(on)
    found = top_k_gating(logits, k, renormalize=renormalize, scoring=scoring)
    weights, experts = top_k_gating_reference(logits.double(), k, renormalize=renormalize, scoring=scoring)
    assert torch.equal(found[1], experts)
    torch.testing.assert_close(found[0].double(), weights, atol=1e-7, rtol=1e-5)
    if renormalize:
        torch.testing.assert_close(found[0].sum(1), torch.ones(3, device=on), atol=1e-6, rtol=0)


def test_of_equal_logits_the_lowest_expert_is_first(on: str) -> None:
    logits = torch.tensor(
        [[1.0, 1, 1, 1, 1, 1], [0.0, -0.0, 2, 0, 2, -0.0], [-3, -1, -2, -1, -torch.inf, -1]], device=on
    )
    for dtype in (torch.float32, torch.bfloat16):
        _, experts = top_k_gating(logits.to(dtype), 4, renormalize=True)
        assert experts.tolist() == [[0, 1, 2, 3], [2, 4, 0, 1], [1, 3, 5, 2]]
    many = torch.randint(-2, 3, (8, 60), device=on).bfloat16()
    assert torch.equal(
        top_k_gating(many, 8, renormalize=False)[1], top_k_gating_reference(many, 8, renormalize=False)[1]
    )


def test_experts_are_in_order_where_their_scores_are_rounded_away(on: str) -> None:
    logits = torch.tensor([[-200.0, 0.0, -190.0, -180.0]], device=on)
    weights, experts = top_k_gating(logits, 3, renormalize=True)
    assert experts.tolist() == [[1, 3, 2]]
    assert weights.tolist() == [[1, 0, 0]]


def test_a_nan_is_above_all_and_every_expert_there_is(on: str) -> None:
    logits = torch.tensor([[0.0, torch.nan, 1, -torch.nan]], device=on)
    weights, experts = top_k_gating(logits, 4, renormalize=True)
    assert experts.tolist() == [[1, 3, 2, 0]]
    assert weights.isnan().all()


@CASES
@pytest.mark.parametrize("block_rows", [16, BLOCK_ROWS])
def test_routing_sorts_pairs_by_expert(on: str, tokens: int, num_experts: int, k: int, block_rows: int) -> None:
    experts = random_experts(tokens, num_experts, k).to(on)
    out = poisoned(experts, num_experts, block_rows)
    routing = route(experts, num_experts, block_rows, out=out)
    assert routing.sorted_pairs.data_ptr() == out.data_ptr()
    assert_routed(routing)


@pytest.mark.parametrize("case", ["one expert", "one without", "the last alone", "more than a program looks at"])
def test_routing_of_uneven_experts(on: str, case: str) -> None:
    experts = random_experts(1100 if case == "more than a program looks at" else 100, 8, 2)
    if case == "one expert":
        experts.fill_(3)
    elif case == "one without":
        experts[experts == 5] = 6
    elif case == "the last alone":
        experts.fill_(7)
    assert_routed(route(experts.to(on), 8, out=poisoned(experts.to(on), 8)))


def test_pairs_of_no_expert_are_in_no_block(on: str) -> None:
    experts = random_experts(30, 8, 2).to(on)
    experts[3, 1], experts[4, 0], experts[29, 1] = 8, -1, 1 << 30
    routing = route(experts, 8, out=poisoned(experts, 8))
    reference = route_reference(experts, 8)
    for name in ("sorted_pairs", "block_experts", "counts", "offsets"):
        assert torch.equal(getattr(routing, name), getattr(reference, name)), name
    assert routing.counts.sum() == 57
    assert not {7, 8, 59} & set(routing.sorted_pairs.tolist())


def assert_routed(routing: Routing) -> None:
    """Against torch's sort."""
    of_pair = routing.experts.flatten().long()
    counts = of_pair.bincount(minlength=routing.num_experts)
    blocks = (counts + routing.block_rows - 1) // routing.block_rows
    used = int(blocks.sum())
    assert routing.counts.tolist() == counts.tolist()
    assert routing.offsets.tolist() == [0, *(blocks.cumsum(0) * routing.block_rows).tolist()]
    expected = torch.arange(routing.num_experts, device=blocks.device).repeat_interleave(blocks)
    assert routing.block_experts[:used].tolist() == expected.tolist()
    assert (routing.block_experts[used:] == -1).all()
    assert len(routing.sorted_pairs) == len(routing.block_experts) * routing.block_rows
    pairs = routing.sorted_pairs
    assert pairs[pairs != -1].tolist() == of_pair.argsort(stable=True).tolist()
    for expert, (first, count) in enumerate(zip(routing.offsets.tolist(), counts.tolist(), strict=False)):
        assert (of_pair[pairs[first : first + count]] == expert).all()


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "inputs", "outputs"),
    [
        (1, 4, 1, 64, 64),
        (2, 4, 4, 33, 65),
        (2, 60, 4, 7, 1),
        (17, 8, 2, 100, 7),
        (64, 8, 2, 1, 130),
        (130, 4, 4, 65, 33),
        pytest.param(130, 60, 8, 65, 33, marks=pytest.mark.slow),
    ],
)
def test_linear_matches_the_reference(
    on: str, tokens: int, num_experts: int, k: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    experts = random_experts(tokens, num_experts, k).to(on)
    weight = (torch.randn(num_experts, outputs, inputs) / inputs**0.5).to(on, dtype)
    weight[[e for e in range(num_experts) if e not in set(experts.flatten().tolist())]] = torch.nan
    routing = route(experts, num_experts, out=poisoned(experts, num_experts))
    pair_weights = torch.rand(tokens, k).to(on)
    for rows, weights in ((tokens, None), (tokens * k, pair_weights)):
        x = torch.randn(rows, inputs).to(on, dtype)
        out = torch.full((tokens * k, outputs), torch.nan, dtype=dtype, device=on)
        assert grouped_linear(x, packed(weight), routing, pair_weights=weights, out=out) is out
        expected = grouped_linear_reference(
            x.double(), weight.double(), experts, None if weights is None else weights.double()
        )
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        wide = out.float().fill_(torch.nan)
        grouped_linear(x, packed(weight), routing, pair_weights=weights, out=wide)
        torch.testing.assert_close(wide.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "k", "inputs", "outputs"), [(1, 1, 33, 7), (17, 1, 64, 65), (17, 4, 33, 130)])
def test_linear_with_a_bias_of_each_expert(
    on: str, tokens: int, k: int, inputs: int, outputs: int, weighted: bool, dtype: torch.dtype
) -> None:
    """The bias is added in float32, before the weight of a pair is multiplied in: it is the expert's answer."""
    experts = random_experts(tokens, 5, k).to(on)
    x, weight = torch.randn(tokens, inputs).to(on, dtype), torch.randn(5, outputs, inputs).to(on, dtype)
    bias, pair_weights = (10 * torch.randn(5, outputs)).to(on, dtype), torch.rand(tokens, k).to(on)
    weights = pair_weights if weighted else None
    found = grouped_linear(
        x,
        ExpertWeights(weight, 5, bias=bias),
        route(experts, 5),
        pair_weights=weights,
        out=torch.full((tokens * k, outputs), torch.nan, device=on),
    )
    wide = None if weights is None else weights.double()
    expected = grouped_linear_reference(x.double(), weight.double(), experts, wide, bias.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_linear_adds_the_bias_before_it_rounds(on: str) -> None:
    x, weight, bias = torch.ones(1, 1, device=on), torch.full((1, 1, 1), 2.0**-9), torch.ones(1, 1)
    weights = ExpertWeights(weight.to(on).bfloat16(), 1, bias=bias.to(on).bfloat16())
    routing = route(torch.zeros(1, 1, dtype=torch.int32, device=on), 1)
    y = grouped_linear(x.bfloat16(), weights, routing, pair_weights=torch.full((1, 1), 512.0, device=on))
    assert y.item() == 512 + 1 - 1  # 513 is no bfloat16, and 1 + 2^-9 is none either
    wide = torch.empty(1, 1, device=on)
    grouped_linear(x.bfloat16(), weights, routing, pair_weights=torch.full((1, 1), 512.0, device=on), out=wide)
    assert wide.item() == 513


@pytest.mark.parametrize("case", ["one expert", "one without"])
@pytest.mark.parametrize("block_rows", [16, 128])
def test_linear_of_uneven_experts(on: str, case: str, block_rows: int) -> None:
    experts = random_experts(70, 4, 2)
    experts = torch.full_like(experts, 2) if case == "one expert" else experts.where(experts != 1, 3)
    experts = experts.to(on)
    x, weight = torch.randn(70, 20).to(on), torch.randn(4, 24, 20).to(on)
    out = torch.full((140, 24), torch.nan, device=on)
    grouped_linear(x, packed(weight), route(experts, 4, block_rows), out=out)
    expected = grouped_linear_reference(x.double(), weight.double(), experts)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_each_pair_through_its_expert() -> None:
    experts = random_experts(5, 4, 2)
    x, weight, pair_weights = torch.randn(5, 6).double(), torch.randn(4, 3, 6).double(), torch.rand(5, 2).double()
    expected = torch.einsum("ti,tkoi,tk->tko", x, weight[experts.long()], pair_weights).flatten(0, 1)
    torch.testing.assert_close(grouped_linear_reference(x, weight, experts, pair_weights), expected)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "k", "width"), [(1, 8, 33), (2, 1, 7), (17, 4, 1025), (64, 2, 64), (130, 1, 8), (130, 8, 3)]
)
def test_combine_adds_the_rows_of_a_token(on: str, tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens * width)
    y = torch.randn(tokens * k, width).to(on, dtype)
    out = torch.full((tokens, width), torch.nan, dtype=dtype, device=on)
    assert combine(y, k, out=out) is out
    torch.testing.assert_close(
        out.double(), combine_reference(y.double(), k), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 8, 33), (3, 1, 7), (17, 4, 1025)])
def test_combine_adds_the_expert_that_all_share(
    on: str, tokens: int, k: int, width: int, gated: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens * width)
    y, shared, logits = (torch.randn(rows, n) for rows, n in ((tokens * k, width), (tokens, width), (tokens, 1)))
    y, shared = y.to(on), shared.to(on, dtype)
    gate = (5 * logits).to(on, dtype) if gated else None
    out = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=on)
    assert combine(y, k, shared=shared, shared_gate=gate, out=out) is out
    expected = combine_reference(y.double(), k, shared.double(), None if gate is None else gate.double())
    torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=8e-3)
    wide = combine(y, k, shared=shared, shared_gate=gate)
    torch.testing.assert_close(wide.double(), expected, atol=1e-5, rtol=1e-5)
    last = slice(tokens - 1, tokens)
    alone = combine(y[-k:], k, shared=shared[last], shared_gate=None if gate is None else gate[last])
    assert torch.equal(alone, wide[last])


@DTYPES
@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 1, 33), (3, 2, 7), (17, 1, 1025)])
def test_combine_weighs_the_experts_against_what_all_share(
    on: str, tokens: int, k: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens * width)
    y, shared, logits = (torch.randn(rows, n) for rows, n in ((tokens * k, width), (tokens, width), (tokens, 2)))
    y, shared, logits = y.to(on), shared.to(on, dtype), (5 * logits).to(on, dtype)
    mixed = combine(y, k, shared=shared, shared_gate=logits)
    expected = combine_reference(y.double(), k, shared.double(), logits.double())
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)
    out = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=on)
    combine(y, k, shared=shared, shared_gate=logits, out=out)
    assert torch.equal(out, mixed.bfloat16()), "rounded once"
    last = slice(tokens - 1, tokens)
    assert torch.equal(combine(y[-k:], k, shared=shared[last], shared_gate=logits[last]), mixed[last])


def test_the_reference_mixes_as_a_residual_mixture_does() -> None:
    """The experts have the first of the softmax, the MLP that all share has the second."""
    y, shared, logits = torch.randn(2, 3).double(), torch.randn(2, 3).double(), torch.randn(2, 2).double()
    first = logits[:, :1].exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(combine_reference(y, 1, shared, logits), first * y + (1 - first) * shared)


def test_a_mix_of_far_logits_is_one_of_the_two(on: str) -> None:
    y, shared = torch.randn(2, 9, device=on), torch.randn(2, 9, device=on)
    logits = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], device=on)
    assert torch.equal(combine(y, 1, shared=shared, shared_gate=logits), torch.stack([y[0], shared[1]]))


def test_combine_rounds_once(on: str) -> None:
    y, shared = torch.randn(2 * 3, 50, device=on), torch.randn(2, 50, device=on)
    expected = (y[0::3] + y[1::3]) + y[2::3]
    assert torch.equal(combine(y, 3), expected)
    assert torch.equal(combine(y, 3, shared=shared), expected + shared)
    assert torch.equal(combine(y, 3, out=torch.empty(2, 50, device=on).bfloat16()), expected.bfloat16())
    narrow = y.bfloat16()
    wide = combine(narrow.float(), 3)
    assert torch.equal(combine(narrow, 3), wide.bfloat16())


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (17, 3), (130, 8)])
def test_each_part_of_the_experts_computes_its_own_pairs(on: str, tokens: int, k: int) -> None:
    """What parts of the experts compute, each with zeros for the others' pairs, adds up to what all compute at once."""
    experts = random_experts(tokens, 12, k).to(on)
    x, weight, bias = torch.randn(tokens, 40), torch.randn(12, 24, 40), torch.randn(12, 24)
    x, weight, bias = x.to(on), weight.to(on), bias.to(on)
    whole = grouped_linear(x, ExpertWeights(weight, 12, bias=bias), route(experts, 12))
    total = torch.zeros_like(whole)
    for first in (0, 4, 8):
        mine = slice(first, first + 4)
        routing = route(experts, 4, first=first, out=poisoned(experts, 4))
        for name in ("sorted_pairs", "block_experts", "counts", "offsets"):
            assert torch.equal(getattr(routing, name), getattr(route_reference(experts - first, 4), name)), name
        y = torch.zeros_like(whole)
        grouped_linear(x, ExpertWeights(weight[mine], 4, bias=bias[mine]), routing, out=y)
        assert not y[((experts < first) | (experts >= first + 4)).flatten()].any()
        total += y
    assert torch.equal(total, whole)


def layer(x: Tensor, logits: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """Two linears of experts, with nothing between them that is not tested here."""
    weights, experts = top_k_gating(logits, k, renormalize=True)
    routing = route(experts, len(first), out=poisoned(experts, len(first)))
    hidden = grouped_linear(x, packed(first), routing)
    return combine(grouped_linear(hidden, packed(second), routing, pair_weights=weights), k)


@DTYPES
@pytest.mark.parametrize(("num_experts", "k"), [(4, 2), pytest.param(60, 8, marks=pytest.mark.slow)])
def test_a_token_keeps_its_bits_among_others(on: str, num_experts: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    x, logits = torch.randn(130, 48).to(on, dtype), torch.randn(130, num_experts).to(on, dtype)
    first = torch.randn(num_experts, 40, 48).to(on, dtype)
    second = torch.randn(num_experts, 70, 40).to(on, dtype)
    whole = layer(x, logits, first, second, k)
    assert whole.isfinite().all()
    for rows in (1, 2, 17):
        assert torch.equal(layer(x[-rows:], logits[-rows:], first, second, k), whole[-rows:])
    for row in (0, 1, 63, 64):
        alone = slice(row, row + 1)
        assert torch.equal(layer(x[alone], logits[alone], first, second, k), whole[alone])


@pytest.mark.parametrize("num_experts", [8, 256])
def test_gating_of_a_token_keeps_its_bits_among_others(on: str, num_experts: int) -> None:
    logits = torch.randn(10, num_experts, device=on)
    weights, experts = top_k_gating(logits, 8, renormalize=False)
    for rows in (1, 3):
        found = top_k_gating(logits[-rows:], 8, renormalize=False)
        assert torch.equal(found[0], weights[-rows:])
        assert torch.equal(found[1], experts[-rows:])


def test_no_tokens_are_no_work(on: str) -> None:
    weights, experts = top_k_gating(torch.empty(0, 8, device=on), 2, renormalize=True)
    assert weights.shape == experts.shape == (0, 2)
    routing = route(experts, 8, out=poisoned(experts, 8))
    assert routing.offsets.tolist() == [0] * 9
    y = grouped_linear(torch.empty(0, 16, device=on), packed(torch.zeros(8, 24, 16, device=on)), routing)
    assert y.shape == (0, 24)
    assert combine(y, 2).shape == (0, 24)


@pytest.mark.parametrize("renormalize", [False, True], ids=["Qwen2-MoE", "Mixtral"])
def test_weights_are_the_best_probabilities_of_all_experts(on: str, renormalize: bool) -> None:
    """As both models compute them: softmax, then the best, which Mixtral divides by their sum."""
    logits = torch.randn(7, 60, device=on)
    expected, experts = logits.double().softmax(-1).topk(4)
    if renormalize:
        expected /= expected.sum(-1, keepdim=True)
    found = top_k_gating(logits, 4, renormalize=renormalize)
    assert torch.equal(found[1], experts.int())
    torch.testing.assert_close(found[0].double(), expected, atol=1e-7, rtol=1e-5)


def test_an_expert_that_is_masked_comes_last_and_weighs_nothing(on: str) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]], device=on)
    weights, experts = top_k_gating(logits, 4, renormalize=False)
    assert experts.tolist() == [[2, 0, 1, 3]]
    assert weights[0, 2:].tolist() == [0, 0]
    torch.testing.assert_close(weights[0, :2], torch.tensor([1.0, 0], device=on).softmax(-1))


@pytest.mark.slow
def test_linear_of_qwens_widths(on: str) -> None:
    experts = random_experts(3, 6, 4).to(on)
    x, weight = torch.randn(3, 2048).to(on).bfloat16(), (torch.randn(6, 2816, 2048) / 45).to(on).bfloat16()
    y = grouped_linear(x, packed(weight), route(experts, 6))
    torch.testing.assert_close(
        y.double(), grouped_linear_reference(x.double(), weight.double(), experts), atol=1e-2, rtol=1e-2
    )


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    ("num_experts", "k", "inputs", "outputs"),
    [(8, 2, 4096, 28672), (8, 2, 14336, 4096), (60, 4, 2048, 2816), (60, 4, 1408, 2048)],
    ids=["Mixtral, first", "Mixtral, second", "Qwen, first", "Qwen, second"],
)
def test_linear_of_real_shapes(num_experts: int, k: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(num_experts, outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    x = torch.randn(300, inputs, device="cuda").to(dtype)
    experts = random_experts(300, num_experts, k).cuda()
    experts_weight = packed(weight)
    y = grouped_linear(x, experts_weight, route(experts, num_experts))
    for expert in range(num_experts):  # a float64 copy of one expert at a time
        pairs = (experts.flatten() == expert).nonzero().flatten()
        expected = x[pairs // k].double() @ weight[expert].double().T
        tolerance = 5e-5 if dtype == torch.float32 else TOLERANCE[dtype]  # of up to 14336 products
        torch.testing.assert_close(y[pairs].double(), expected, atol=tolerance, rtol=tolerance)
    for rows in (1, 8, 65):
        alone = grouped_linear(x[:rows], experts_weight, route(experts[:rows], num_experts))
        assert torch.equal(alone, y[: rows * k])


@pytest.mark.gpu
def test_a_graph_routes_again() -> None:
    num_experts, k = 8, 2
    logits, x = torch.randn(20, num_experts, device="cuda"), torch.randn(20, 64, device="cuda").bfloat16()
    weight = packed(torch.randn(num_experts, 96, 64, device="cuda").bfloat16())

    def run() -> Tensor:
        weights, experts = top_k_gating(logits, k, renormalize=True)
        return combine(grouped_linear(x, weight, route(experts, num_experts), pair_weights=weights), k)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        logits.normal_()
        x.normal_()
        graph.replay()
        assert torch.equal(out, run())


def test_broken_contracts_are_refused() -> None:
    logits = torch.randn(4, 8)
    with pytest.raises(ValueError, match="logits must be contiguous float32, bfloat16 or float16"):
        top_k_gating(logits.double(), 2, renormalize=True)
    with pytest.raises(ValueError, match="logits must be contiguous"):
        top_k_gating(logits.t(), 2, renormalize=True)
    with pytest.raises(ValueError, match="1 to 256 experts, got 257"):
        top_k_gating(torch.randn(4, 257), 2, renormalize=True)
    with pytest.raises(ValueError, match="k must be from 1 to 8 of 8 experts, got 9"):
        top_k_gating(logits, 9, renormalize=True)
    with pytest.raises(ValueError, match="scoring must be"):
        top_k_gating(logits, 2, renormalize=True, scoring="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights_out must be"):
        top_k_gating(logits, 2, renormalize=True, weights_out=torch.empty(4, 3))
    with pytest.raises(ValueError, match="experts_out must be"):
        top_k_gating(logits, 2, renormalize=True, experts_out=torch.empty(4, 2))
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        top_k_gating(logits.to("meta"), 2, renormalize=True)

    experts = random_experts(4, 8, 2)
    with pytest.raises(ValueError, match="experts must be contiguous int32"):
        route(experts.long(), 8)
    with pytest.raises(ValueError, match="num_experts must be"):
        route(experts, 257)
    with pytest.raises(ValueError, match="block_rows must be"):
        route(experts, 8, 48)
    with pytest.raises(ValueError, match="first must be 0 or more, got -1"):
        route(experts, 8, first=-1)
    with pytest.raises(ValueError, match="out must be"):
        route(experts, 8, out=torch.empty(8, dtype=torch.int32))

    routing, x, plain = route(experts, 8), torch.randn(4, 16), torch.randn(8, 24, 16)
    weight = packed(plain)
    with pytest.raises(ValueError, match="x must be contiguous float32, bfloat16 or float16 \\[4 or 8, in_features\\]"):
        grouped_linear(x[:3], weight, routing)
    with pytest.raises(ValueError, match="weight must be"):
        grouped_linear(x, packed(plain.bfloat16()), routing)
    with pytest.raises(ValueError, match="weight must be"):
        grouped_linear(x, packed(plain[:7]), routing)
    with pytest.raises(ValueError, match="weight must be"):
        grouped_linear(x, packed(plain.transpose(1, 2)), routing)
    with pytest.raises(ValueError, match="pair_weights must be"):
        grouped_linear(x, weight, routing, pair_weights=torch.ones(8))
    with pytest.raises(ValueError, match="out must be"):
        grouped_linear(x, weight, routing, out=torch.empty(4, 24))
    with pytest.raises(ValueError, match="out must be"):
        grouped_linear(x, weight, routing, out=torch.empty(8, 24).bfloat16())

    y = torch.randn(8, 24)
    with pytest.raises(ValueError, match="y must be"):
        combine(y.double(), 2)
    with pytest.raises(ValueError, match="k must be from 1 to 8 and divide the 8 rows"):
        combine(y, 3)
    with pytest.raises(ValueError, match="out must be"):
        combine(y, 2, out=torch.empty(8, 24))
    with pytest.raises(ValueError, match="shared must be"):
        combine(y, 2, shared=torch.empty(8, 24))
    with pytest.raises(
        ValueError, match=r"shared_gate must be contiguous torch.float32 or torch.bfloat16 or torch.float16 \[4, 1\]"
    ):
        combine(y, 2, shared=torch.empty(4, 24), shared_gate=torch.empty(4))
    with pytest.raises(ValueError, match="shared_gate is of shared"):
        combine(y, 2, shared_gate=torch.empty(4, 1))
