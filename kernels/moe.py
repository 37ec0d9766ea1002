"""Mixture of experts: which experts a token goes to, their linear layers, and the sum of what they answer.

    gating:   score = softmax(logits) or sigmoid(logits);  weights = the k best, perhaps divided by their sum
    routing:  the pairs of each expert, side by side
    linear:   y[pair] = (x[row of pair] @ weight[expert of pair].T + its bias) * weight of pair
    combine:  sum[token] = y[first pair of token] + ... + y[its last pair]
              out[token] = sum (+ sigmoid(shared_gate) * shared), or
                           sum * a + shared * b, where a, b = softmax(shared_gate)

                                                              (Shazeer et al. 2017, arXiv:1701.06538)

logits   [tokens, experts], float32, bfloat16 or float16
experts  [tokens, k] int32, and weights [tokens, k] float32, in falling order
pair     token * k + choice: what one expert computes for one token
x        [tokens, in_features], or [tokens * k, in_features], a row for each pair
weight   [experts, out_features, in_features] of x's dtype, packed once into ExpertWeights, perhaps quantized
y        [tokens * k, out_features]
shared   [tokens, out_features]: what an expert answered that every token goes to (Qwen2-MoE, arXiv:2407.10671), weighed
         by a gate of its own or against the others (residual MoE: Rajbhandari et al. 2022, arXiv:2201.05596)
out      [tokens, out_features]

All contiguous. float32 inside, rounded once by each op. The bits of a token or pair depend on that one alone, for one
block_rows. An expert's number that there is not computes nothing: its pair's row of y is left undefined, not refused.

On a CPU (kernels/cpu/moe.c) a pair has the bits that kernels/linear.py gives its row: the same code computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES
from kernels.experts import ExpertWeights
from kernels.linear import c_linear

BLOCK_ROWS = 64  # the rows of one instruction on sm_90
MAX_EXPERTS = 256
MAX_CHOICES = 8


@dataclass(frozen=True)
class Routing:
    """The pairs of each expert, in rows: expert e has those from offsets[e] to offsets[e + 1], whole blocks.

    Its pairs come first, in their order; the rest of its rows is -1, and so is what no expert has.
    """

    experts: Tensor  # int32 [tokens, k], as given
    sorted_pairs: Tensor  # int32 [rows]
    block_experts: Tensor  # int32 [rows / block_rows]
    counts: Tensor  # int32 [experts], the pairs of each
    offsets: Tensor  # int32 [experts + 1]
    block_rows: int

    @property
    def num_pairs(self) -> int:
        return self.experts.numel()

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]


def top_k_gating(
    logits: Tensor,
    k: int,
    *,
    renormalize: bool,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    weights_out: Tensor | None = None,
    experts_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token -> (weights float32 [tokens, k], experts int32 [tokens, k]).

    The highest logits, of equal ones the lowest expert; a NaN is above all. Distinct logits whose scores are rounded to
    the same number are still in order.
    renormalize: the k weights of a token add up to 1.
    Raises ValueError when an argument breaks the contract.
    """
    if logits.dtype not in CODES or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            "logits must be contiguous float32, bfloat16 or float16 [tokens, experts], "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    tokens, num_experts = logits.shape
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"logits must be of 1 to {MAX_EXPERTS} experts, got {num_experts}")
    if not 1 <= k <= min(MAX_CHOICES, num_experts):
        raise ValueError(f"k must be from 1 to {min(MAX_CHOICES, num_experts)} of {num_experts} experts, got {k}")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, got {scoring}")
    weights = _out("weights_out", weights_out, (tokens, k), (torch.float32,), logits)
    experts = _out("experts_out", experts_out, (tokens, k), (torch.int32,), logits)
    if in_triton("top_k_gating", logits):
        from kernels.cuda.moe import top_k_gating as launch

        launch(logits, weights, experts, scoring == "sigmoid", renormalize)
    else:
        library.call("tandem_top_k_gating",
            logits.data_ptr(), weights.data_ptr(), experts.data_ptr(), tokens, num_experts, k,
            CODES[logits.dtype], int(scoring == "sigmoid"), int(renormalize), torch.get_num_threads(),
        )  # fmt: skip
    return weights, experts


def routing_size(num_pairs: int, num_experts: int, block_rows: int = BLOCK_ROWS) -> int:
    """How many int32 a Routing is made of."""
    return sum(_routing_parts(num_pairs, num_experts, block_rows))


def route(
    experts: Tensor, num_experts: int, block_rows: int = BLOCK_ROWS, *, first: int = 0, out: Tensor | None = None
) -> Routing:
    """Sorts pairs by expert. experts: int32 [tokens, k]; out: int32 [routing_size(...)], the memory of the result.

    first: the number that the first of the experts goes by; pairs of other numbers are nobody's here.
    A Routing has as many rows as the pairs could need at most, so the host need not know how they fell.
    Raises ValueError when an argument breaks the contract.
    """
    if experts.dtype != torch.int32 or experts.dim() != 2 or not experts.is_contiguous():
        raise ValueError(f"experts must be contiguous int32 [tokens, k], got {experts.dtype} {list(experts.shape)}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts must be from 1 to {MAX_EXPERTS}, got {num_experts}")
    if block_rows not in (16, 32, 64, 128):
        raise ValueError(f"block_rows must be 16, 32, 64 or 128, got {block_rows}")
    if first < 0:
        raise ValueError(f"first must be 0 or more, got {first}")
    parts = _routing_parts(experts.numel(), num_experts, block_rows)
    out = _out("out", out, (sum(parts),), (torch.int32,), experts)
    rows, blocks, counts, offsets = out.split(parts)
    blocks, counts, offsets = blocks[: len(rows) // block_rows], counts[:num_experts], offsets[: num_experts + 1]
    routing = Routing(experts, rows, blocks, counts, offsets, block_rows)
    if in_triton("route", experts):
        from kernels.cuda.moe import route as launch

        launch(routing, first)
    else:
        library.call("tandem_route",
            experts.data_ptr(), rows.data_ptr(), blocks.data_ptr(), counts.data_ptr(), offsets.data_ptr(),
            experts.numel(), len(blocks) * block_rows, num_experts, block_rows, first,
        )  # fmt: skip
    return routing


def grouped_linear(
    x: Tensor, weight: ExpertWeights, routing: Routing, *, pair_weights: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Each pair's row of x through its expert's linear layer -> [tokens * k, out_features] of x's dtype, or `out`.

    x: a row for each token, which all its pairs read, or one for each pair.
    pair_weights: float32 [tokens, k], multiplied in before rounding.
    out may also be float32, so that `combine` is the first to round.
    Raises ValueError when a tensor breaks the contract.
    """
    tokens, k = routing.experts.shape
    if x.dtype not in CODES or x.dim() != 2 or len(x) not in (tokens, tokens * k) or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous float32, bfloat16 or float16 [{tokens} or {tokens * k}, in_features], "
            f"got {x.dtype} {list(x.shape)}"
        )
    if weight.dtype != x.dtype or weight.num_experts != routing.num_experts or weight.in_features != x.shape[1]:
        raise ValueError(
            f"weight must be {x.dtype} [{routing.num_experts}, out_features, {x.shape[1]}], "
            f"got {weight.dtype} {[weight.num_experts, weight.out_features, weight.in_features]}"
        )
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}")
    if pair_weights is not None and (
        pair_weights.dtype != torch.float32 or pair_weights.shape != (tokens, k) or not pair_weights.is_contiguous()
    ):
        raise ValueError(
            f"pair_weights must be contiguous float32 [{tokens}, {k}], "
            f"got {pair_weights.dtype} {list(pair_weights.shape)}"
        )
    out = _out("out", out, (tokens * k, weight.out_features), (x.dtype, torch.float32), x)
    if in_triton("grouped_linear", x):
        from kernels.cuda import moe, quantized_experts

        if weight.quantization is None:
            moe.grouped_linear(x, weight.packed, weight.bias, routing, pair_weights, out)
        else:
            quantized_experts.grouped_linear(x, weight, routing, pair_weights, out)
    elif c_linear(
        "tandem_grouped_linear", x, weight.first, out,
        routing.sorted_pairs.data_ptr(), routing.counts.data_ptr(), routing.offsets.data_ptr(), routing.num_experts,
        len(out) // max(len(x), 1), _address(pair_weights), weight.packed[0].numel() * weight.packed.element_size(),
    ):  # fmt: skip
        raise MemoryError(f"no memory for {len(out)} rows of {weight.in_features} features")
    return out


def combine(
    y: Tensor,
    k: int,
    *,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds the k rows of each token, in order -> [tokens, width] of y's dtype, or `out`, which may be narrower.

    The weights are in y already: `grouped_linear` has a pair's sums in float32 when it multiplies by them, so that
    costs no rounding.
    shared: [tokens, width], of any of their dtypes, added last.
    shared_gate: logits, likewise. [tokens, 1]: shared is multiplied by their sigmoid. [tokens, 2]: the sum and shared
    are multiplied by their softmax.
    Raises ValueError when a tensor breaks the contract.
    """
    if y.dtype not in CODES or y.dim() != 2 or not y.is_contiguous():
        raise ValueError(
            f"y must be contiguous float32, bfloat16 or float16 [tokens * k, width], got {y.dtype} {list(y.shape)}"
        )
    if not 1 <= k <= MAX_CHOICES or len(y) % k:
        raise ValueError(f"k must be from 1 to {MAX_CHOICES} and divide the {len(y)} rows of y, got {k}")
    tokens, width = len(y) // k, y.shape[1]
    gates = 2 if shared_gate is not None and shared_gate.shape[-1:] == (2,) else 1
    for name, tensor, columns in (("shared", shared, width), ("shared_gate", shared_gate, gates)):
        if tensor is not None:
            _out(name, tensor, (tokens, columns), tuple(CODES), y)
    if shared_gate is not None and shared is None:
        raise ValueError("shared_gate is of shared, and there is none")
    out = _out("out", out, (tokens, width), tuple(dict.fromkeys((y.dtype, torch.bfloat16, torch.float16))), y)
    if in_triton("combine", y):
        from kernels.cuda.moe import combine as launch

        launch(y, k, shared, shared_gate, out)
    else:
        dtypes = (0 if tensor is None else CODES[tensor.dtype] for tensor in (y, shared, shared_gate, out))
        library.call("tandem_combine",
            y.data_ptr(), _address(shared), _address(shared_gate), out.data_ptr(), tokens, width, k, *dtypes,
            torch.get_num_threads(), gates,
        )  # fmt: skip
    return out


def top_k_gating_reference(
    logits: Tensor, k: int, *, renormalize: bool, scoring: Literal["softmax", "sigmoid"] = "softmax"
) -> tuple[Tensor, Tensor]:
    """Gating in plain torch, with weights of the dtype of its input."""
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, best)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, best.int()


def route_reference(experts: Tensor, num_experts: int, block_rows: int = BLOCK_ROWS) -> Routing:
    """Routing in plain torch, expert by expert."""
    rows = _routing_rows(experts.numel(), num_experts, block_rows)
    sorted_pairs, block_experts = experts.new_full((rows,), -1), experts.new_full((rows // block_rows,), -1)
    counts, offsets = experts.new_zeros(num_experts), experts.new_zeros(num_experts + 1)
    row = 0
    for expert in range(num_experts):
        pairs = (experts.flatten() == expert).nonzero().flatten()
        end = row + -(-len(pairs) // block_rows) * block_rows
        sorted_pairs[row : row + len(pairs)] = pairs.int()
        block_experts[row // block_rows : end // block_rows] = expert
        counts[expert], offsets[expert + 1] = len(pairs), end
        row = end
    return Routing(experts, sorted_pairs, block_experts, counts, offsets, block_rows)


def grouped_linear_reference(
    x: Tensor, weight: Tensor, experts: Tensor, pair_weights: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The linear layers in plain torch, in the dtype of x. A pair whose expert there is not gets zeros."""
    of_pair = experts.flatten()
    rows = x if len(x) == len(of_pair) else x.repeat_interleave(experts.shape[1], 0)
    y = x.new_zeros(len(of_pair), weight.shape[1])
    for expert in range(len(weight)):
        of_expert = rows[of_pair == expert] @ weight[expert].T
        y[of_pair == expert] = of_expert if bias is None else of_expert + bias[expert]
    return y if pair_weights is None else y * pair_weights.view(-1, 1).to(x.dtype)


def combine_reference(y: Tensor, k: int, shared: Tensor | None = None, shared_gate: Tensor | None = None) -> Tensor:
    """The sums in plain torch, in the dtype of its inputs."""
    total = y.unflatten(0, (len(y) // k, k)).sum(1)
    if shared is None:
        return total
    if shared_gate is None:
        return total + shared
    if shared_gate.shape[1] == 1:
        return total + shared_gate.sigmoid() * shared
    own, others = shared_gate.softmax(-1).split(1, dim=1)
    return total * own + shared * others


def _routing_rows(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The most rows that pairs can fill, in whole blocks: an expert that has any pads block_rows - 1 of them."""
    return (num_pairs + min(num_pairs, num_experts) * (block_rows - 1)) // block_rows * block_rows


def _routing_parts(num_pairs: int, num_experts: int, block_rows: int) -> list[int]:
    """int32 of a Routing's tensors, each begun at a multiple of 16 bytes: kernels are compiled for such addresses."""
    rows = _routing_rows(num_pairs, num_experts, block_rows)
    return [-(-size // 4) * 4 for size in (rows, rows // block_rows, num_experts, num_experts + 1)]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _out(name: str, out: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: Tensor) -> Tensor:
    """`out` if it has that shape and one of the dtypes, or memory of the first."""
    if out is None:
        return like.new_empty(shape, dtype=dtypes[0])
    if out.dtype not in dtypes or out.shape != torch.Size(shape) or not out.is_contiguous():
        kinds = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{name} must be contiguous {kinds} {list(shape)}, got {out.dtype} {list(out.shape)}")
    return out
