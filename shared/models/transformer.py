"""The layers that every family is made of: one loop, which reads the architecture record.

A sub-layer's output is added to the stream together with the norm of the sub-layer after it: `advance` is one op, and
the loop is shifted by one norm against the way that models are drawn. Where a norm stands after the addition ("post"),
that is the same loop with the first norm left out and the stream going on with what the norm made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activation import activate, gated
from kernels.add import add
from kernels.gather import gather
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear import LinearWeight, linear
from kernels.moe import combine, grouped_linear, route, routing_size, top_k_gating
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.scale import scale
from shared.models.architecture import Architecture
from shared.models.expert_ranks import ExpertRanks
from shared.models.ranks import Columns, Ranks
from shared.models.weights import LayerWeights, ModelWeights, Norm
from shared.workspace import Workspace

# (layer, what it reads [tokens, hidden], the layer's weights) -> attended values [tokens, heads * head_dim]
Attend = Callable[[int, Tensor, LayerWeights], Tensor]


@dataclass(frozen=True)
class Take:
    """The model's own dtype for what is taken from a workspace."""

    workspace: Workspace
    dtype: torch.dtype

    def __call__(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.workspace.take(name, rows, width, dtype or self.dtype)

    def like(self, name: str, x: Tensor) -> Tensor:
        return self.workspace.take(name, x.shape[0], x.shape[1], x.dtype)


class Transformer:
    """The layers of a loaded model. Each op gives a row the same bits whatever rows are beside it."""

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        *,
        deterministic: bool = True,
        ranks: Ranks | None = None,
        expert_ranks: ExpertRanks | None = None,
    ) -> None:
        """ranks: that have the model together, of which the weights are this one's part; expert_ranks: its experts."""
        self.architecture, self._layers, self._deterministic = architecture, weights.layers, deterministic
        self.ranks, self._expert_ranks = ranks, expert_ranks
        self._is_post = architecture.norm_order == "post"
        self._carries_norm = self._is_post or architecture.stream_of_norm
        self._norms = self._norms_in_order(weights)
        # called with a layer's index when it was computed, or launched, and with -1 before the first
        self.after_layer: Callable[[int], None] | None = None

    def forward(self, stream: Tensor, attend: Attend, take: Take, wanted: Tensor | None = None) -> Tensor:
        """stream [tokens, hidden], which is overwritten -> what the output layer reads, of all tokens or of the rows
        `wanted` (int64) alone: after the last attention a token looks at no other."""
        run = _Stream(self, stream, take)
        norms = iter(self._norms)
        if self.after_layer is not None:
            self.after_layer(-1)
        run.enter(next(norms))
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = attend(index, run.x, layer)
            if index == last and wanted is not None:
                attended = gather(attended, wanted, out=take("wanted", len(wanted), attended.shape[1]))
                run.keep(wanted)
                if not len(wanted):
                    return run.x
            output = take("output", attended.shape[0], self.architecture.hidden_size)
            output = self._last_linear("output", attended, "queries", layer.output, take, output)
            output = self._closed(output, layer.attention_output_norm, take)
            if self.architecture.parallel:
                read = run.also(layer.mlp_norm)
                run.add(output)
                output = self._mlp(read, index, layer, take)
            else:
                run.advance(output, next(norms))
                output = self._mlp(run.x, index, layer, take)
            run.advance(self._closed(output, layer.mlp_output_norm, take), next(norms))
            if self.after_layer is not None:
                self.after_layer(index)
        return run.x

    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor) -> Tensor:
        return linear(x, weight, out=out, own_bits=self._deterministic)

    def whole_linear(self, x: Tensor, weight: LinearWeight, columns: Columns, take: Take, out: Tensor) -> Tensor:
        """A linear whose outputs may lie on the ranks -> out, with all of them."""
        if self.ranks is None:
            return self.linear(x, weight, out)
        own = self.linear(x, weight, take(f"own_{columns}", x.shape[0], weight.out_features, out.dtype))
        return self.ranks.gather(own, columns, out)

    def _last_linear(
        self, module: str, x: Tensor, columns: Columns, weight: LinearWeight, take: Take, out: Tensor
    ) -> Tensor:
        """A sub-layer's last: of x this rank has its columns, and out is whole on all of them."""
        ranks, rows = self.ranks, x.shape[0]
        if ranks is None:
            return self.linear(x, weight, out)
        if ranks.splits_inputs(module, weight):
            return ranks.add(self.linear(x, weight, take("partial", rows, out.shape[1], torch.float32)), out)
        whole = ranks.gather(x, columns, take("all_columns", rows, ranks.width(columns)))
        return self.whole_linear(whole, weight, "hidden", take, out)

    def norm(self, x: Tensor, norm: Norm, out: Tensor) -> Tensor:
        if self.architecture.norm == "rms":
            return rms_norm(x, norm.weight, self.architecture.norm_eps, out=out)
        return layer_norm(x, norm.weight, norm.bias, self.architecture.norm_eps, out=out)

    def _norms_in_order(self, weights: ModelWeights) -> tuple[Norm | None, ...]:
        """Those that stand between the sub-layers, the first before all of them and the last behind."""
        norms: list[Norm | None] = [None] if self._is_post else []
        for layer in weights.layers:
            norms.append(layer.attention_norm)
            if not self.architecture.parallel:
                norms.append(layer.mlp_norm)
        return tuple(norms) if self._is_post else (*norms, weights.final_norm)

    def _closed(self, output: Tensor, norm: Norm | None, take: Take) -> Tensor:
        """A sub-layer's output as it is added to the stream."""
        if norm is not None:
            output = self.norm(output, norm, take.like("normed", output))
        factor = self.architecture.output_scale
        return output if factor == 1.0 else scale(output, factor, out=output)

    def _mlp(self, x: Tensor, index: int, layer: LayerWeights, take: Take) -> Tensor:
        a, rows = self.architecture, x.shape[0]
        output = take("output_of_mlp" if a.parallel else "output", rows, a.hidden_size)
        if a.has_experts(index):
            return self._experts(x, index, layer, take, output)
        assert layer.up
        assert layer.down
        up = self.linear(x, layer.up, take("up", rows, layer.up.out_features))
        return self._last_linear("down", self._activated(up, take, "activated"), "mlp", layer.down, take, output)

    def _activated(self, up: Tensor, take: Take, name: str) -> Tensor:
        a = self.architecture
        if not a.gated:
            return activate(up, a.activation, out=up)
        return gated(up, a.activation, out=take(name, up.shape[0], up.shape[1] // 2))

    def _experts(self, x: Tensor, index: int, layer: LayerWeights, take: Take, output: Tensor) -> Tensor:
        """The mixture of those that a token goes to, and what all tokens go through besides."""
        experts = self.architecture.experts
        assert experts
        assert layer.router
        rows, k = x.shape[0], experts.per_token
        logits = self.linear(x, layer.router, take("router", rows, layer.router.out_features))
        weights, chosen = top_k_gating(
            logits,
            k,
            renormalize=experts.renormalize,
            weights_out=take("pair_weights", rows, k, torch.float32),
            experts_out=take("pair_experts", rows, k, torch.int32),
        )
        y = self._answers(x, index, layer, weights, chosen, take)
        shared, gate = self._shared_expert(x, layer, take)
        return combine(y, k, shared=shared, shared_gate=gate, out=output)

    def _answers(
        self, x: Tensor, index: int, layer: LayerWeights, weights: Tensor, chosen: Tensor, take: Take
    ) -> Tensor:
        """Of each pair's expert, times its weight: float32 [tokens * k, hidden]."""
        assert layer.experts_up
        assert layer.experts_down
        ranks, pairs, count = self._expert_ranks, chosen.numel(), layer.experts_up.num_experts
        memory = take("routing", 1, routing_size(pairs, count), torch.int32)[0]
        routing = route(chosen, count, first=ranks.first(index) if ranks else 0, out=memory)
        up = take("experts_up", pairs, layer.experts_up.out_features)
        grouped_linear(x, layer.experts_up, routing, out=up)
        activated = self._activated(up, take, "experts_activated")
        y = take("experts_down", pairs, layer.experts_down.out_features, torch.float32)
        if ranks is None:
            return grouped_linear(activated, layer.experts_down, routing, pair_weights=weights, out=y)
        if ranks.shares_outputs:
            activated = ranks.gather(activated, "mlp", take("all_columns", pairs, ranks.width("mlp")))
        grouped_linear(activated, layer.experts_down, routing, pair_weights=weights, out=y.zero_())
        if ranks.shares_outputs:
            y = ranks.gather(y, "hidden", take("all_experts_down", pairs, ranks.width("hidden"), torch.float32))
        return ranks.add_disjoint(y)

    def _shared_expert(self, x: Tensor, layer: LayerWeights, take: Take) -> tuple[Tensor | None, Tensor | None]:
        if layer.shared_up is None or layer.shared_down is None or layer.shared_gate is None:
            return None, None
        rows = x.shape[0]
        up = self.linear(x, layer.shared_up, take("shared_up", rows, layer.shared_up.out_features))
        activated = self._activated(up, take, "shared_activated")
        shared = take("shared_down", rows, x.shape[1])
        shared = self._last_linear("shared_down", activated, "shared_mlp", layer.shared_down, take, shared)
        return shared, self.linear(x, layer.shared_gate, take("shared_gate", rows, layer.shared_gate.out_features))


class _Stream:
    """The residual stream of a forward, and `x`, what the next sub-layer reads of it."""

    def __init__(self, transformer: Transformer, stream: Tensor, take: Take) -> None:
        self._transformer, self._stream, self._take = transformer, stream, take
        self._spare = take.like("x", stream)
        self.x = stream

    def enter(self, norm: Norm | None) -> None:
        """Before the first sub-layer."""
        self.x = self._stream
        if norm is not None:
            self.x = self._transformer.norm(self._stream, norm, self._spare)
            self._carry()

    def advance(self, output: Tensor, norm: Norm | None) -> None:
        """Adds a sub-layer's output, and makes what the next one reads."""
        if norm is None:
            self.add(output)
            self.x = self._stream
            return
        a = self._transformer.architecture
        if a.norm == "rms":
            add_rms_norm(output, self._stream, norm.weight, a.norm_eps, out=self._spare, residual_out=self._stream)
        else:
            add_layer_norm(
                output, self._stream, norm.weight, norm.bias, a.norm_eps, out=self._spare, residual_out=self._stream
            )
        self.x = self._spare
        self._carry()

    def also(self, norm: Norm | None) -> Tensor:
        """What a parallel MLP reads: what attention did, or the stream through a norm of its own."""
        if norm is None:
            return self.x
        return self._transformer.norm(self._stream, norm, self._take.like("x_of_mlp", self._stream))

    def add(self, output: Tensor) -> None:
        add(output, self._stream, out=self._stream)

    def keep(self, rows: Tensor) -> None:
        """Only these rows from here on."""
        same, count, width = self.x is self._stream, len(rows), self._stream.shape[1]
        x = self.x
        self._stream = gather(self._stream, rows, out=self._take("wanted_stream", count, width))
        self.x = self._stream
        if not same and self._transformer.architecture.parallel:
            self.x = gather(x, rows, out=self._take("wanted_x", count, width))
        self._spare = self._take("wanted_spare", count, width)

    def _carry(self) -> None:
        if self._transformer._carries_norm:
            self._stream, self._spare = self.x, self._stream
