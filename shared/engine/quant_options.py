"""What the section `quant` asks for, of a model's own parameters: a plan for fused layers, or a scheme for each module.

Names are the model's own, `model.layers.0.mlp.up_proj`. The fused layers have others, and join some of these into one:
what is said of the parts has to be the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from kernels.quantization import Quantization
from shared.config import GroupQuantConfig, InferenceConfig
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan, Scheme, quantizable
from shared.models.shapes import EXPERTS, layer_shapes
from shared.policies.names import choose
from shared.policies.policy import Policy


class QuantOptions:
    """The section of one configuration. `check_used` at the end tells the keys that no parameter's name held."""

    def __init__(self, config: InferenceConfig) -> None:
        weight = config.quant.weight
        self.leaves_qkv = not config.quant.qkv.enabled
        self.every = self.layers = None  # of every linear and embedding; of linears by dtype int8
        if weight.quantized_initialization:
            self.every = _scheme(GroupQuantConfig.of(weight.quantized_initialization))
        if str(config.dtype) == "torch.int8":
            how = Quantization(
                weight.num_bits,
                symmetric=weight.q_type != "asymmetric",
                floating=weight.q_type == "float",
                dynamic=config.quant.activation.dynamic,
            )
            self.layers = Scheme(how, groups=weight.q_groups)
        self.keys = {key: _scheme(value) for key, value in weight.post_init_quant.items()}
        self._unused = set(self.keys)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is to be quantized."""
        return self.every is None and self.layers is None and not self.keys

    def plan(self, policy: Policy, architecture: Architecture, present: Collection[str]) -> QuantizationPlan:
        """For fused layers. present: the names that the model has, of those that the policy may call its parameters.

        Raises ValueError naming parameters that one linear is made of and that should be kept in different ways.
        """
        exclude = ("*.qkv",) if self.leaves_qkv else ()
        if not self.keys:
            layers = self.layers or self.every
            # its errors go straight to the sampler, so that by dtype int8 it is int8 whatever the layers are
            lm_head = self.every or (layers and Scheme(Quantization(8)))
            return QuantizationPlan(layers, lm_head, exclude)
        for name in _names(policy, "embedding", present):
            if self.scheme_of(name) is not None:
                raise ValueError(
                    f"quant.weight.post_init_quant: {name} is looked up row by row as it is by fused layers; leave out "
                    "kernel_inject, or that key"
                )
        own: dict[str, Scheme | None] = {}
        for ours in quantizable(architecture):
            if self.leaves_qkv and ours.endswith(".qkv"):
                continue
            module, layer, experts = ours.rpartition(".")[2], 0, 1
            if module != "lm_head":
                layer = int(ours.split(".")[1])
                experts = layer_shapes(architecture, layer)[f"{module}.weight"][0] if module in EXPERTS else 1
            own[ours] = self._common(_names(policy, f"{module}.weight", present, layer, experts))
        return QuantizationPlan(own=own)

    def schemes(self, linears: Iterable[str], embeddings: Iterable[str], policy: Policy | None) -> dict[str, Scheme]:
        """For modules as they are: name -> scheme. policy: of the model's family, which knows its projections.

        Raises ValueError where these are to be left and nobody knows them, and for a module that two keys name.
        """
        linears = list(linears)
        if self.leaves_qkv and not self.is_plain:
            if policy is None:
                raise ValueError("quant.qkv.enabled: false, and which linears these are is not known of this model")
            linears = [name for name in linears if not _is_qkv(name, policy)]
        if self.keys:
            named = {name: self.scheme_of(f"{name}.weight") for name in (*linears, *embeddings)}
            return {name: scheme for name, scheme in named.items() if scheme is not None}
        if self.every is not None:
            return dict.fromkeys([*linears, *embeddings], self.every)
        return {} if self.layers is None else dict.fromkeys(linears, self.layers)

    def scheme_of(self, name: str) -> Scheme | None:
        """Of the key that a parameter's name holds. ValueError if it holds two."""
        held = [key for key in self.keys if key in name]
        if len(held) > 1:
            raise ValueError(
                f"quant.weight.post_init_quant: {name} is matched by {held[0]!r} and by {held[1]!r}; let one name it"
            )
        self._unused -= set(held)
        return self.keys[held[0]] if held else None

    def check_used(self) -> None:
        """Raises ValueError for a key that was in no name."""
        for key in sorted(self._unused):
            raise ValueError(f"quant.weight.post_init_quant: {key!r} is in the name of no parameter that is quantized")

    def _common(self, names: list[str]) -> Scheme | None:
        """What all of them are to be."""
        schemes = {name: self.scheme_of(name) for name in names}
        for name, scheme in schemes.items():
            if scheme != schemes[names[0]]:
                raise ValueError(
                    f"quant.weight.post_init_quant: {names[0]} and {name} are one linear of the fused layers; let keys "
                    "say the same of both, or leave out kernel_inject"
                )
        return schemes[names[0]] if names else None


def parameter_names(module: nn.Module) -> set[str]:
    """Every name, of those that share a parameter too."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


def _scheme(options: GroupQuantConfig) -> Scheme:
    return Scheme(Quantization(options.num_bits, options.group_size, options.symmetric))


def _names(policy: Policy, ours: str, present: Collection[str], layer: int = 0, experts: int = 1) -> list[str]:
    """What the model calls a parameter of ours, or the parts of it."""
    if ours not in policy.names:
        return []
    source = choose(policy.names[ours], present)
    return list(dict.fromkeys(name for expert in range(experts) for name in source.at(layer, expert).names))


def _is_qkv(name: str, policy: Policy) -> bool:
    """Whether a module is what the family projects to queries, keys and values by, or a part of that."""
    named = {re.sub(r"\.\d+\.", ".{layer}.", f"{prefix}{name}.weight", count=1) for prefix in ("", f"{policy.base}.")}
    return any(named & set(source.names) for source in policy.names.get("qkv.weight", ()))
