"""Norms of the residual stream: before a sub-layer, together with the addition before it, and after it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm
from shared.config.modules import Norm, NormConfig
from shared.engine.modules.module import Module, check_dtype, same_dtypes


class _StreamNorm(Module[NormConfig]):
    """What the two have in common."""

    config_class = NormConfig

    def __init__(self, config: NormConfig, *, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device=device)
        self._take("output", config.max_tokens, config.channels, config.output_dtype)

    @classmethod
    def objection(cls, config: NormConfig) -> str | None:
        return same_dtypes(config, "residual_dtype", "input_dtype", "output_dtype")

    def transform_param(self, param: Tensor) -> Tensor:
        """gamma or beta [channels] as a call wants it."""
        return norm_param(param, self.config.residual_dtype, self.device)

    def _checked(self, residual: Tensor, hidden_states: Tensor | None) -> None:
        check_dtype("residual", residual, "residual_dtype", self.config.residual_dtype)
        if hidden_states is not None:
            check_dtype("hidden_states", hidden_states, "input_dtype", self.config.input_dtype)


class PreNorm(_StreamNorm):
    """residual += hidden_states; hidden = norm(residual)"""

    name = "cuda_pre_norm"

    def __call__(
        self, residual: Tensor, hidden_states: Tensor | None, gamma: Tensor, beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """residual, hidden_states [rows, channels] -> (residual, hidden). The residual is added to in place; without
        hidden_states it stays."""
        self._checked(residual, hidden_states)
        out = self._output(residual, self.config.channels, self.config.output_dtype)
        if hidden_states is None:
            return residual, normed(residual, self.config.type, gamma, beta, self.config.eps, out)
        return residual, _added(hidden_states, residual, self.config, gamma, beta, out=out, total=residual)


class PostNorm(_StreamNorm):
    """residual = hidden = norm(residual + hidden_states)"""

    name = "cuda_post_norm"

    def __call__(
        self, residual: Tensor, hidden_states: Tensor, gamma: Tensor, beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """residual, hidden_states [rows, channels] -> (residual, hidden), both of which are the residual, in place."""
        self._checked(residual, hidden_states)
        total = self._output(residual, self.config.channels, self.config.output_dtype)
        _added(hidden_states, residual, self.config, gamma, beta, out=residual, total=total)
        return residual, residual


def norm_param(param: Tensor, dtype: str, device: torch.device) -> Tensor:
    """In the dtype of the rows, or in float32, which norms read beside any."""
    return param.to(device, torch.float32 if param.dtype == torch.float32 else DTYPES[dtype]).contiguous()


def normed(x: Tensor, kind: Norm, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor) -> Tensor:
    """The norm of each row of x. ValueError where gamma or beta is missing, or one too many."""
    gamma = _given(kind, gamma, beta)
    if kind == "rms_norm":
        return rms_norm(x, gamma, eps, out=out)
    return layer_norm(x, gamma, beta, eps, out=out)


def _added(
    x: Tensor,
    residual: Tensor,
    config: NormConfig,
    gamma: Tensor,
    beta: Tensor | None,
    *,
    out: Tensor,
    total: Tensor,
) -> Tensor:
    _given(config.type, gamma, beta)
    if config.type == "rms_norm":
        return add_rms_norm(x, residual, gamma, config.eps, out=out, residual_out=total)[0]
    return add_layer_norm(x, residual, gamma, beta, config.eps, out=out, residual_out=total)[0]


def _given(kind: Norm, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is None:
        raise ValueError(f"gamma: is missing, and a {kind} has one")
    if beta is not None and kind == "rms_norm":
        raise ValueError("beta: is given, and an rms_norm has none; leave it out")
    return gamma
