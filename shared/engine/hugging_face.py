"""What of transformers the engine has to know: its output types, its caches, its generation. Imported where it is used.

The one file of the engine that imports transformers; that takes seconds, and no worker needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithPast,
)

from shared.engine.session import Session

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "CausalLMOutputWithPast",
    "KvSessionCache",
    "PreTrainedModel",
    "asked_of_generation",
    "shell_of",
]


class KvSessionCache(Cache):
    """A session as the cache that transformers passes from call to call: `past_key_values`."""

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were fed, padding too."""
        return self.session.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.session.max_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_initialized(self) -> bool:
        return True

    def crop(self, max_length: int, *args: Any, **kwargs: Any) -> None:
        """Forgets all columns behind the first `max_length`, or the last `-max_length` ones."""
        self.session.crop(max_length if max_length >= 0 else self.session.columns + max_length)

    def reset(self) -> None:
        self.session.crop(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("rows of a cache are not exchanged: beams are not supported")


def shell_of(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, **overrides: Any) -> PreTrainedModel:
    """A model of the same class and configuration that computes by `overrides`, its parameters left out.

    overrides: methods by name; `forward` above all. What of the class is about generating goes on working.
    """
    kind = type(model)
    with torch.device("meta"):
        shell = kind(model.config)
    for child in list(shell.children()):
        child.requires_grad_(False)
    properties = {"device": property(lambda _: device), "dtype": property(lambda _: dtype)}
    methods = {name: staticmethod(method) for name, method in overrides.items()}
    shell.__class__ = type(kind.__name__, (kind,), {**properties, **methods, "__module__": kind.__module__})
    if getattr(model, "generation_config", None) is not None:
        shell.generation_config = model.generation_config
    return shell.eval()


def model_on_meta(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder's config.json, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def model_from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def encoder_from_folder(folder: Path) -> PreTrainedModel:
    """As transformers loads it, as the class that its config.json names, or without a head."""
    [name, *_] = getattr(AutoConfig.from_pretrained(folder), "architectures", None) or [""]
    kind = getattr(transformers, name, AutoModel)
    return kind.from_pretrained(folder, dtype=torch.float32)


def asked_of_generation(module: nn.Module, arguments: dict[str, Any]) -> GenerationConfig:
    """What `generate` would make of these arguments, as far as they are fields of a GenerationConfig."""
    given = arguments.get("generation_config") or getattr(module, "generation_config", None) or GenerationConfig()
    asked = GenerationConfig.from_dict(given.to_dict())
    asked.update(**{name: value for name, value in arguments.items() if hasattr(asked, name)})
    return asked
