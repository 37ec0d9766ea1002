"""Modules by DeepSpeed's names, and which one a config wants.

    linear = instantiate_config(ConfigBundle("quantized_wf6af16_linear", LinearConfig(...)))
    linear = instantiate_linear(LinearConfig(...), engine_config)

A class of your own becomes one of them by `register_module`. Where a name does not matter, `Linear(config)` is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from kernels.quantization import Quantization
from shared.config.modules import LinearConfig, ModuleConfig
from shared.config.ragged import RaggedEngineConfig
from shared.engine.modules.attention import SelfAttention
from shared.engine.modules.embedding import Embedding
from shared.engine.modules.linear import Linear
from shared.engine.modules.module import Module
from shared.engine.modules.moe import Moe
from shared.engine.modules.norm import PostNorm, PreNorm
from shared.engine.modules.unembed import Unembed

Kind = TypeVar("Kind", bound=type[Module])


@dataclass(frozen=True)
class ConfigBundle:
    """A module's name, its config, and what its class is told besides, by keyword."""

    name: str
    config: ModuleConfig
    implementation_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """What a name stands for: a class, made with these keywords, for configs that have these values."""

    kind: type[Module]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)

    def objection(self, config: ModuleConfig) -> str | None:
        for name, value in self.only.items():
            if getattr(config, name) != value:
                return f"{name}: {getattr(config, name)}, and it is for {value}"
        return None


_MODULES: dict[str, _Entry] = {
    "dense_blocked_attention": _Entry(SelfAttention),
    "ragged_embedding": _Entry(Embedding),
    "blas_fp_linear": _Entry(Linear),
    "quantized_wf6af16_linear": _Entry(
        Linear, {"quantization": Quantization(6, floating=True)}, {"input_dtype": "float16", "output_dtype": "float16"}
    ),
    "cutlass_multi_gemm_moe": _Entry(Moe),
    "cuda_pre_ln": _Entry(PreNorm, only={"type": "layer_norm"}),
    "cuda_pre_rms": _Entry(PreNorm, only={"type": "rms_norm"}),
    "cuda_post_ln": _Entry(PostNorm, only={"type": "layer_norm"}),
    "cuda_post_rms": _Entry(PostNorm, only={"type": "rms_norm"}),
    "ragged_unembed": _Entry(Unembed),
}


def register_module(kind: Kind) -> Kind:
    """Adds a class by its `name` -> the class: a decorator.

    Raises TypeError for what is no subclass of Module, ValueError for a name that another class has.
    """
    if not (isinstance(kind, type) and issubclass(kind, Module)):
        raise TypeError(f"{kind!r} is no subclass of {Module.__module__}.{Module.__name__}")
    if kind.name in _MODULES:
        raise ValueError(f"name: {kind.name} is {_MODULES[kind.name].kind.__name__}'s; give the class one of its own")
    _MODULES[kind.name] = _Entry(kind)
    return kind


def instantiate_config(bundle: ConfigBundle, *, device: torch.device | str = "cpu") -> Module:
    """The module of that name for that config.

    Raises KeyError for an unknown name, TypeError for a config of another class, ValueError naming the field for a
    config that it does not support.
    """
    entry = _MODULES.get(bundle.name)
    if entry is None:
        raise KeyError(f"unknown module {bundle.name}: it is none of {', '.join(_MODULES)}")
    config, kind = bundle.config, entry.kind
    if not isinstance(config, kind.config_class):
        raise TypeError(f"{bundle.name} wants a {kind.config_class.__name__}, has a {type(config).__name__}")
    objection = entry.objection(config) or kind.objection(config)
    if objection or not kind.supports_config(config):
        raise ValueError(f"{bundle.name} does not support this config: {objection or config}")
    return kind(config, device=device, **{**entry.made_with, **bundle.implementation_config})


def instantiate_linear(
    config: LinearConfig, engine_config: RaggedEngineConfig | None = None, *, device: torch.device | str = "cpu"
) -> Linear:
    """Quantized as the engine's config says; without one, as it is."""
    mode = engine_config.quantization.quantization_mode if engine_config else None
    name = "quantized_wf6af16_linear" if mode == "wf6af16" else "blas_fp_linear"
    module = instantiate_config(ConfigBundle(name, config), device=device)
    assert isinstance(module, Linear)
    return module
