"""A linear layer with its bias and activation: the module of projections and of an MLP's halves."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import activate, gated
from kernels.dtypes import DTYPES
from kernels.linear import LinearWeight, linear
from kernels.quantization import Quantization
from shared.config.modules import Activation, LinearConfig
from shared.engine.modules.module import Module, check_dtype

# as DeepSpeed computes them: gelu is its approximation by tanh
PLAIN = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}
GATED = {"geglu": "gelu_tanh", "reglu": "relu", "siglu": "silu"}


class Linear(Module[LinearConfig]):
    """y = activation(x @ weight.T + bias), or of a gated one y = activation(gate) * up of the two halves of it.

    output_dtype may be float32 whatever input_dtype is: nothing is rounded to the narrower one then.
    """

    name = "blas_fp_linear"
    config_class = LinearConfig

    def __init__(
        self, config: LinearConfig, *, quantization: Quantization | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """quantization: what weights are kept as; activations stay what they are."""
        super().__init__(config, device=device)
        self.quantization = quantization
        self._take("output", config.max_tokens, config.out_channels, config.output_dtype)
        if config.activation in GATED:
            self._take("gate_up", config.max_tokens, 2 * config.out_channels, config.output_dtype)

    @classmethod
    def objection(cls, config: LinearConfig) -> str | None:
        if config.output_dtype not in (config.input_dtype, "float32"):
            return f"output_dtype: {config.output_dtype} from {config.input_dtype} is not computed; give it, or float32"
        return None

    def transform_param(self, weight: Tensor, bias: Tensor | None = None, *, interleaved: bool = False) -> LinearWeight:
        """A weight [out, in] as a call wants it, packed once. It may be of any dtype, and is freed by the caller.

        Of a gated activation it has 2 * out_channels rows: those of the gate, then those of up. interleaved: they
        alternate, a gate's row first, as DeepSpeed's weights of a gated MLP lie, and the bias does likewise.
        Raises ValueError for a weight or bias of another shape than the config says.
        """
        rows = self.config.out_channels * (2 if self.config.activation in GATED else 1)
        if weight.shape != (rows, self.config.in_channels):
            raise ValueError(f"weight: is {list(weight.shape)}, wanted {[rows, self.config.in_channels]}")
        if interleaved:
            weight, bias = gate_then_up(weight), None if bias is None else gate_then_up(bias)
        dtype = DTYPES[self.config.input_dtype]
        placed = None if bias is None else bias.to(self.device, dtype)
        return LinearWeight(weight.to(self.device, dtype), placed, self.quantization)

    def __call__(self, hidden_states: Tensor, w: LinearWeight) -> Tensor:
        """hidden_states [rows, in_channels] -> [rows, out_channels]."""
        config = self.config
        check_dtype("hidden_states", hidden_states, "input_dtype", config.input_dtype)
        out = self._output(hidden_states, config.out_channels, config.output_dtype)
        if config.activation not in GATED:
            return activated(linear(hidden_states, w, out=out), config.activation, out)
        gate_up = self._take("gate_up", len(out), 2 * config.out_channels, config.output_dtype)
        return activated(linear(hidden_states, w, out=gate_up), config.activation, out)


def activated(x: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """x [rows, width], or of a gated activation [rows, 2 * width] -> out [rows, width], which a plain one may share."""
    if activation in GATED:
        return gated(x, GATED[activation], out=out)
    return x if activation == "identity" else activate(x, PLAIN[activation], out=out)


def gate_then_up(interleaved: Tensor, dim: int = 0) -> Tensor:
    """Rows that alternate, a gate's first -> all of the gate, then all of up."""
    half = interleaved.shape[dim] // 2
    return interleaved.unflatten(dim, (half, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
