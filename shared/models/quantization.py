"""Which of a model's weights are quantized, and how: one record that is asked for each of them by its name.

    plan = QuantizationPlan.of_mode("int4", exclude=("lm_head", "layers.0.*"))
    plan.of("layers.3.down", in_features=1536)   # Quantization(4, 32, symmetric=False)
    plan.of("lm_head", in_features=576)          # None: it stays as it is

Names are layers.I. with one of LINEARS or EXPERTS (shapes.py), and lm_head. The embedding is read row by row and stays
as it is, and so does what decides where tokens go: routers and gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from kernels.quantization import Quantization
from shared.config import QuantizationMode
from shared.models.architecture import Architecture
from shared.models.shapes import EXPERTS, LINEARS, layer_shapes, modules_of

_LEAST_GROUP = 8


@dataclass(frozen=True)
class Scheme:
    """How weights of any width become few bits.

    quantization: its group is that of rows which it divides. adapts: other rows are cut by the greatest common divisor,
    or have one scale where that is less than 8; else they are refused. groups: how many a row is cut into, instead.
    """

    quantization: Quantization
    adapts: bool = False
    groups: int = 1

    def of(self, in_features: int) -> Quantization:
        """For rows of so many. Raises ValueError where they cannot be cut so."""
        group = self.quantization.group
        if self.groups > 1:
            if in_features % self.groups:
                raise ValueError(f"{in_features} input features cannot be cut into {self.groups} groups")
            return replace(self.quantization, group=in_features // self.groups)
        if group is None or in_features % group == 0:
            return self.quantization
        if not self.adapts:
            raise ValueError(f"{in_features} input features cannot be cut into groups of {group}")
        common = math.gcd(group, in_features)
        return replace(self.quantization, group=common if common >= _LEAST_GROUP else None)


# Integers of 4 bits have groups as GGUF's Q4_1, of which the default model's file is made. Groups of 64 without offsets
# read a quarter less, and raised that model's perplexity by 40%.
_LAYERS = {
    "none": None,
    "int8": Scheme(Quantization(8)),
    "int8_dynamic": Scheme(Quantization(8, dynamic=True)),
    "int4": Scheme(Quantization(4, 32, symmetric=False), adapts=True),
    "fp8": Scheme(Quantization(8, floating=True)),
    "fp6": Scheme(Quantization(6, floating=True)),
}


@dataclass(frozen=True)
class QuantizationPlan:
    """layers: of the layers' linears and experts; lm_head: of the output layer; None: they stay as they are.

    exclude: patterns, as a shell's, of names that stay as they are. own: of some names, instead of all that.
    """

    layers: Scheme | None = None
    lm_head: Scheme | None = None
    exclude: tuple[str, ...] = ()
    own: Mapping[str, Scheme | None] = field(default_factory=dict)

    @classmethod
    def of_mode(cls, mode: QuantizationMode, exclude: Iterable[str] = ()) -> QuantizationPlan:
        """The service's. The output layer is int8 in each of them: its errors go straight to the sampler."""
        layers = _LAYERS[mode]
        return cls(layers, layers and Scheme(Quantization(8)), tuple(sorted(set(exclude))))

    @classmethod
    def of_ragged(cls, mode: str | None) -> QuantizationPlan:
        """DeepSpeed's `quantization_mode`: wf6af16 is FP6, a scale for each row, of the layers' linears but experts."""
        if mode is None:
            return cls()
        if mode != "wf6af16":
            raise ValueError(f"Unsupported quantization mode: {mode}; wf6af16 is the one there is")
        return cls(_LAYERS["fp6"], exclude=("*.experts_*",))

    @property
    def is_plain(self) -> bool:
        """Whether nothing is quantized."""
        return self.layers is None and self.lm_head is None and not any(self.own.values())

    def of(self, name: str, in_features: int) -> Quantization | None:
        """How that weight is quantized; None: it stays as it is. Raises ValueError naming one that cannot be cut."""
        scheme = self._scheme(name)
        try:
            return scheme and scheme.of(in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def unmatched(self, architecture: Architecture) -> list[str]:
        """The patterns that are for no weight of a model."""
        names = list(quantizable(architecture))
        return [pattern for pattern in self.exclude if not any(fnmatchcase(name, pattern) for name in names)]

    def _scheme(self, name: str) -> Scheme | None:
        if name in self.own:
            return self.own[name]
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return None
        return self.lm_head if name == "lm_head" else self.layers


def quantizable(a: Architecture) -> Iterator[str]:
    """The names of a model's weights that a plan is asked for."""
    for layer in range(a.num_layers):
        for module in modules_of(layer_shapes(a, layer)):
            if module in (*LINEARS, *EXPERTS):
                yield f"layers.{layer}.{module}"
    if a.lm_head:
        yield "lm_head"
