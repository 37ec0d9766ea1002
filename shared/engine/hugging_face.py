"""What of transformers the engine has to know: its output types, its caches, its generation. Imported where it is used.

The one file of the engine that imports transformers; that takes seconds, and no worker needs it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shared.engine.session import Session

__all__ = [
    "Asked",
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "CausalLMOutputWithPast",
    "KvSessionCache",
    "PreTrainedModel",
    "UnlistedCausalLM",
    "shallow",
    "shell_of",
    "without_weights",
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

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns: -3 the last three, as transformers counts them. Raises ValueError for others."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.session.columns:
            raise ValueError(
                f"crop: {tokens_to_remove}, wants 0 or less, minus the columns to forget of the {self.session.columns} "
                "that there are"
            )
        self.session.crop(self.session.columns + tokens_to_remove)

    def reset(self) -> None:
        self.session.crop(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("rows of a cache are not exchanged: beams are not supported")


def shell_of(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, **overrides: Any) -> PreTrainedModel:
    """A model of the same class and configuration that computes by `overrides`, its parameters left on meta.

    overrides: functions by the names of the methods that they are in place of; `forward` above all. What of the class
    is about generating goes on working.
    """
    kind = type(model)
    with torch.device("meta"):
        shell = kind(model.config)
    shell.requires_grad_(False)
    properties = {"device": property(lambda _: device), "dtype": property(lambda _: dtype)}
    methods = {name: staticmethod(_plain(function)) for name, function in overrides.items()}
    # positions count the tokens of a row, which the engine does itself: transformers' are wrong behind right padding
    methods["_prepare_position_ids_for_generation"] = staticmethod(lambda *_: None)
    shell.__class__ = type(kind.__name__, (kind,), {**properties, **methods, "__module__": kind.__module__})
    if getattr(model, "generation_config", None) is not None:
        shell.generation_config = model.generation_config
    return shell.eval()


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """One that knows its signature, which transformers asks for before each token."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    vars(call)["__signature__"] = inspect.signature(function)
    return call


class UnlistedCausalLM(PreTrainedModel, GenerationMixin):
    """The interface of a causal language model that transformers has no class for: a shell is made of it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> UnlistedCausalLM:
        """fields: of its config.json."""
        config = PreTrainedConfig()
        for name, value in fields.items():
            if not hasattr(type(config), name) or not isinstance(getattr(type(config), name), property):
                setattr(config, name, value)
        return cls(config)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        raise NotImplementedError("a shell computes by what it is given")


def is_listed(fields: Mapping[str, object]) -> bool:
    """Whether transformers has a causal language model for this config.json."""
    return str(fields.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_on_meta(folder: Path, fields: Mapping[str, object], overrides: Mapping[str, object]) -> PreTrainedModel:
    """The causal language model of a folder's config.json without weights, of a class of transformers if it has one.

    fields: what config.json says. overrides: fields of the config to be other than it says.
    """
    with torch.device("meta"):
        if is_listed(fields):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **overrides))
        else:
            model = UnlistedCausalLM.of({**fields, **overrides})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def model_from_folder(
    folder: Path, dtype: torch.dtype, overrides: Mapping[str, object], *, allow_pickle: bool
) -> PreTrainedModel:
    """As transformers loads it."""
    safetensors_alone = None if allow_pickle else True
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=safetensors_alone, **overrides)


def encoder_from_folder(folder: Path) -> PreTrainedModel:
    """As transformers loads it, as the class that its config.json names, or without a head."""
    [name, *_] = getattr(AutoConfig.from_pretrained(folder), "architectures", None) or [""]
    kind = getattr(transformers, name, AutoModel)
    return kind.from_pretrained(folder, dtype=torch.float32)


def without_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None, *, on_meta: tuple[type[nn.Module], ...] = ()
) -> PreTrainedModel:
    """A model of the same class and config in memory, whose parameters hold nothing yet and are of this dtype.

    on_meta: classes of layers that have no memory either.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with _made_on_meta(on_meta), no_init_weights():
            fresh = type(model)(model.config)
    finally:
        torch.set_default_dtype(default)
    fresh.tie_weights()
    return fresh


@contextlib.contextmanager
def _made_on_meta(kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
    def move(module: nn.Module, name: str, part: nn.Module | None) -> nn.Module | None:
        return part.to("meta") if type(part) in kinds and part is not None else None

    handle = register_module_module_registration_hook(move)  # pyright: ignore[reportArgumentType] - it may answer one
    try:
        yield
    finally:
        handle.remove()


_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def shallow(model: PreTrainedModel, num_layers: int = 2) -> PreTrainedModel:
    """A model of the same class and config, in float32 with random weights, but for its depth: of so few layers."""
    config = copy.deepcopy(model.config)
    before = max((depth for name in _DEPTHS if isinstance(depth := getattr(config, name, None), int)), default=0)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:  # of something for each layer
            setattr(config, name, value[:num_layers])
    for name in _DEPTHS:
        if isinstance(depth := getattr(config, name, None), int):
            setattr(config, name, min(depth, num_layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(model)(config)
        for parameter in made.parameters():
            if parameter.dim() == 1:  # fresh norms are ones and fresh biases zeros, which stand for each other
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made.float().eval()


@dataclass(frozen=True)
class Asked:
    """What a call of `generate` asks for: its own arguments, else its GenerationConfig's, else the model's."""

    config: GenerationConfig
    max_total_tokens: int | None  # of prompt and output; None: max_new_tokens says it
    max_new_tokens: int | None

    @classmethod
    def of(cls, module: nn.Module, arguments: dict[str, Any]) -> Asked:
        """module: with a `generate`, of transformers or with arguments as it has them."""
        given = arguments.get("generation_config")
        own = getattr(module, "generation_config", None)
        prepare = getattr(module, "_prepare_generation_config", None)
        if prepare is None:
            config = GenerationConfig(**{name: arguments[name] for name in _LENGTHS if name in arguments})
        else:
            others = {name: value for name, value in arguments.items() if name in vars(GenerationConfig())}
            config = prepare(given, **others)[0]
        totals = (arguments.get("max_length"), getattr(given, "max_length", None), getattr(own, "max_length", None))
        total = None if config.max_new_tokens is not None else next((n for n in totals if n is not None), None)
        new = config.max_new_tokens
        if new is None and total is None and prepare is not None:
            new = config.max_length  # transformers' default for new tokens alone
        return cls(config, total, new)


_LENGTHS = ("max_length", "max_new_tokens", "num_beams")
