"""A mixture of experts: the gate, the experts' two linears with an activation between them, and the sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from kernels.experts import ExpertWeights
from kernels.linear import LinearWeight, linear
from kernels.moe import MAX_CHOICES, MAX_EXPERTS, combine, grouped_linear, route, routing_size, top_k_gating
from kernels.quantization import Quantization
from shared.config.modules import MoeModuleConfig
from shared.engine.modules.linear import GATED, activated, gate_then_up
from shared.engine.modules.module import Module, check_dtype


class Moe(Module[MoeModuleConfig]):
    """y = sum over the top_k experts e of a row: weight of e * (activation(x @ mlp_1[e].T + b_1) @ mlp_2[e].T + b_2)

    The weights are the softmax of x @ gate.T over all experts, of the chosen ones divided by their sum if
    `normalize_scores`. Sums are rounded once, to output_dtype, whatever input_dtype is.
    """

    name = "cutlass_multi_gemm_moe"
    config_class = MoeModuleConfig

    def __init__(
        self,
        config: MoeModuleConfig,
        *,
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        quantization: Quantization | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """scoring: what of logits makes weights. quantization: what the experts' weights are kept as."""
        super().__init__(config, device=device)
        self._scoring: Literal["softmax", "sigmoid"] = scoring
        self.quantization = quantization
        self._buffers(config.max_tokens)

    @classmethod
    def objection(cls, config: MoeModuleConfig) -> str | None:
        if config.top_k > min(MAX_CHOICES, config.n_experts):
            return f"top_k: {config.top_k} of {config.n_experts} experts; it is {MAX_CHOICES} at most, and not more"
        if config.n_experts > MAX_EXPERTS:
            return f"n_experts: {config.n_experts}; the gate computes {MAX_EXPERTS} at most"
        return None

    def transform_gate_param(self, param: Tensor) -> LinearWeight:
        """The gate [n_experts, model_dim] as a call wants it. ValueError for another shape."""
        shape = (self.config.n_experts, self.config.model_dim)
        if param.shape != shape:
            raise ValueError(f"gate_w: is {list(param.shape)}, wanted {list(shape)}")
        return LinearWeight(param.to(self.device, DTYPES[self.config.input_dtype]))

    def transform_moe_mlp_1_param(
        self, param: Iterable[Tensor], bias: Tensor | None = None, *, interleaved: bool = False
    ) -> ExpertWeights:
        """The experts' first linears, each [intermediate, model_dim], packed as they come; bias [n_experts, the same].

        Of a gated activation each has 2 * intermediate_features rows; see Linear.transform_param.
        Raises ValueError for another shape, or another number of them.
        """
        rows = self.config.intermediate_features * (2 if self.config.activation in GATED else 1)
        return self._packed("mlp_1", param, bias, (rows, self.config.model_dim), interleaved)

    def transform_moe_mlp_2_param(self, param: Iterable[Tensor], bias: Tensor | None = None) -> ExpertWeights:
        """The experts' second linears, each [model_dim, intermediate_features], likewise."""
        return self._packed("mlp_2", param, bias, (self.config.model_dim, self.config.intermediate_features), False)

    def __call__(
        self, hidden_states: Tensor, gate_w: LinearWeight, mlp_1_w: ExpertWeights, mlp_2_w: ExpertWeights
    ) -> Tensor:
        """hidden_states [tokens, model_dim] -> the same shape."""
        config = self.config
        check_dtype("hidden_states", hidden_states, "input_dtype", config.input_dtype)
        out = self._output(hidden_states, config.model_dim, config.output_dtype)
        logits, weights, experts, up, between, y = self._buffers(len(hidden_states))
        linear(hidden_states, gate_w, out=logits)
        top_k_gating(
            logits,
            config.top_k,
            renormalize=config.normalize_scores,
            scoring=self._scoring,
            weights_out=weights,
            experts_out=experts,
        )
        size = routing_size(experts.numel(), config.n_experts)
        routing = route(experts, config.n_experts, out=self._workspace.take("routing", 1, size, torch.int32)[0])
        grouped_linear(hidden_states, mlp_1_w, routing, out=up)
        grouped_linear(activated(up, config.activation, between), mlp_2_w, routing, pair_weights=weights, out=y)
        return combine(y, config.top_k, out=out)

    def _packed(
        self, name: str, param: Iterable[Tensor], bias: Tensor | None, shape: tuple[int, int], interleaved: bool
    ) -> ExpertWeights:
        dtype, experts = DTYPES[self.config.input_dtype], self.config.n_experts

        def each() -> Iterable[Tensor]:
            for weight in param:
                if weight.shape != shape:
                    raise ValueError(f"{name}_w: an expert's is {list(weight.shape)}, wanted {list(shape)}")
                yield (gate_then_up(weight) if interleaved else weight).to(self.device, dtype)

        if bias is not None:
            if bias.shape != (experts, shape[0]):
                raise ValueError(f"{name}_b: is {list(bias.shape)}, wanted {[experts, shape[0]]}")
            bias = (gate_then_up(bias, 1) if interleaved else bias).to(self.device, dtype)
        return ExpertWeights(each(), experts, self.quantization, bias=bias)

    def _buffers(self, tokens: int) -> tuple[Tensor, ...]:
        """logits, weights, experts, the first linears' results, what the second ones read, and what they answer."""
        config, take = self.config, self._workspace.take
        pairs, dtype = tokens * config.top_k, DTYPES[config.input_dtype]
        is_gated = config.activation in GATED
        up = take("up", pairs, config.intermediate_features * (2 if is_gated else 1), dtype)
        return (
            take("logits", tokens, config.n_experts, dtype),
            take("weights", tokens, config.top_k, torch.float32),
            take("experts", tokens, config.top_k, torch.int32),
            up,
            take("activated", pairs, config.intermediate_features, dtype) if is_gated else up,
            take("y", pairs, config.model_dim, torch.float32),
        )
