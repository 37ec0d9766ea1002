"""Hugging Face config.json → Architecture, by the table of the model's family. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shared.model_files import ModelError
from shared.models.architecture import Activation, Architecture, Rope

Config = Mapping[str, object]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class UnsupportedModelError(ModelError):
    """The config asks for something the decoder does not compute; the message names the field and what would do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"config.json: {field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class Policy:
    """A family, as a table.

    `defaults`: what the family's own config class takes for a field that config.json leaves out.
    `qkv_bias`, `output_bias`, `mlp_bias`: fixed by the family, or the name of the config field that says it.
    `sliding`: whether `sliding_window` applies to no layer, to all, or by `layer_types` and `use_sliding_window`.
    `names`: our parameter → the checkpoint's, whose rows are joined in this order; `{layer}` is the layer's index.
    """

    family: str
    defaults: Config
    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    sliding: Literal["never", "always", "by_layer"]
    names: Mapping[str, tuple[str, ...]]

    def architecture(self, config: Config) -> Architecture:
        """Raises UnsupportedModelError naming the field that is missing, of a wrong type or not supported."""
        fields = _Fields({**self.defaults, **config})
        fields.refuse("quantization_config", "weights are quantised already; use the model's unquantised checkpoint")
        activation = _ACTIVATIONS.get(str(fields.get("hidden_act")))
        if activation is None:
            raise UnsupportedModelError("hidden_act", f"{fields.get('hidden_act')!r} is none of {sorted(_ACTIVATIONS)}")
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise UnsupportedModelError("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
        head_dim = fields.integer("head_dim", hidden_size // num_heads)
        if head_dim % 8:
            raise UnsupportedModelError("head_dim", f"{head_dim} is not a multiple of 8, which attention computes in")
        return Architecture(
            family=self.family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps"),
            activation=activation,
            qkv_bias=fields.flag(self.qkv_bias),
            output_bias=fields.flag(self.output_bias),
            mlp_bias=fields.flag(self.mlp_bias),
            qk_norm=self.qk_norm,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            max_context=fields.integer("max_position_embeddings"),
            rope=_rope(fields),
            sliding_window=self._sliding_window(fields),
        )

    def _sliding_window(self, fields: "_Fields") -> tuple[int | None, ...]:
        num_layers = fields.integer("num_hidden_layers")
        window = fields.integer("sliding_window") if fields.get("sliding_window") is not None else None
        if self.sliding == "always":
            return (window,) * num_layers
        if self.sliding == "never" or not fields.flag("use_sliding_window"):
            return (None,) * num_layers
        types = fields.get("layer_types")
        if types is None:
            first = fields.integer("max_window_layers", 0)
            return tuple(window if layer >= first else None for layer in range(num_layers))
        if not isinstance(types, list) or len(types) != num_layers:
            raise UnsupportedModelError("layer_types", f"wants {num_layers} entries, one per layer")
        unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedModelError("layer_types", f"{unknown[0]!r} is not full_attention or sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in types)


class _Fields:
    """Typed reads of config.json. Null is a value of its own: it takes the derived default, not the family's."""

    def __init__(self, values: Config, prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def get(self, field: str, default: object = None) -> object:
        value = self.values.get(field)
        return default if value is None else value

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UnsupportedModelError(self.prefix + field, f"wants a whole number, has {value!r}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnsupportedModelError(self.prefix + field, f"wants a number, has {value!r}")
        return float(value)

    def flag(self, field: bool | str) -> bool:
        value = field if isinstance(field, bool) else self.get(field, False)
        if not isinstance(value, bool):
            raise UnsupportedModelError(f"{self.prefix}{field}", f"wants true or false, has {value!r}")
        return value

    def refuse(self, field: str, why: str) -> None:
        if self.get(field):
            raise UnsupportedModelError(self.prefix + field, why)


def _rope(fields: _Fields) -> Rope:
    """transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling` and `rope_theta` beside it."""
    field = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(field, {})
    if not isinstance(given, dict):
        raise UnsupportedModelError(field, f"wants an object, has {given!r}")
    per_layer_type = [value for value in given.values() if isinstance(value, dict)]
    if per_layer_type:
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise UnsupportedModelError(field, "differs between layer types; one rope for all layers is supported")
        given = per_layer_type[0]
    values = _Fields(given, f"{field}.")
    if values.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor", "heads that are rotated in part are not supported")
    theta = values.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    max_context = fields.integer("max_position_embeddings")
    original = fields.integer(
        "original_max_position_embeddings", values.integer("original_max_position_embeddings", max_context)
    )
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=values.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            factor=values.number("factor"),
            original_context=original,
            low_frequency_factor=values.number("low_freq_factor"),
            high_frequency_factor=values.number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = values.number("factor", max_context / original)
        return Rope(
            theta,
            "yarn",
            factor=factor,
            original_context=original,
            beta_fast=values.number("beta_fast", 32.0) or 32.0,
            beta_slow=values.number("beta_slow", 1.0) or 1.0,
            truncate=values.flag("truncate") if values.get("truncate") is not None else True,
            attention_factor=values.number("attention_factor", _yarn_attention_factor(factor, values)),
        )
    why = "; its frequencies change as a sequence grows" if kind in ("dynamic", "longrope") else ""
    raise UnsupportedModelError(
        f"{field}.rope_type", f"{kind!r} is not supported{why}: default, linear, llama3 and yarn are"
    )


def _yarn_attention_factor(factor: float, values: _Fields) -> float:
    """What yarn multiplies cos and sin by when the model does not say: 0.1 ln(factor) + 1."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = values.number("mscale", 0.0), values.number("mscale_all_dim", 0.0)
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
