"""Hugging Face config.json → Architecture, by the table of the model's family. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.models.architecture import Activation, Architecture
from shared.policies.fields import Config, Fields, Renamed, Setting, UnsupportedModelError
from shared.policies.names import Names
from shared.policies.positions import rope_of, windows_by_layer

__all__ = ["Config", "Fields", "Policy", "Setting", "UnsupportedModelError"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Policy:
    """A family, as a table.

    `names`: our parameter -> where it lies in the checkpoint; a name may come without `base` and a dot before it, as
    those of a model without its head do. `ignored`: patterns of names that may be there and are not read.
    `fields`: the common name of a config field -> the family's own, where it has another, or those it has had.
    `defaults`: what the family's own config class takes for a field that config.json leaves out.
    `record`: what the architecture record has beside the common fields; a Setting is read from the config.
    `rest`: what of the record a table cannot say, as values by name.
    `sliding`: whether `sliding_window` applies to no layer, to all, or by `layer_types` and `use_sliding_window`.
    `rotary`: whether queries and keys turn, and which dimensions make a pair.
    `kind`: what comes of it: "decoder" answers tokens, "encoder" vectors.
    """

    family: str
    names: Names
    base: str = "model"
    ignored: tuple[str, ...] = ()
    fields: Renamed = field(default_factory=dict)
    defaults: Config = field(default_factory=dict)
    record: Mapping[str, object] = field(default_factory=dict)
    rest: Callable[[Fields], Mapping[str, object]] | None = None
    sliding: Literal["never", "always", "by_layer"] = "never"
    rotary: Literal["halves", "interleaved"] | None = "halves"
    kind: Literal["decoder", "encoder"] = "decoder"

    def architecture(self, config: Config) -> Architecture:
        """Raises UnsupportedModelError naming the field that is missing, of a wrong type or not supported."""
        fields = Fields({**self.defaults, **config}, self.fields)
        fields.refuse("quantization_config", "weights are quantised already; use the model's unquantised checkpoint")
        values: dict[str, Any] = {**self._common(fields), **self.record}
        for name, value in values.items():
            if isinstance(value, Setting):
                values[name] = fields.flag(value.field, value.default) != value.inverted
        values |= self.rest(fields) if self.rest else {}
        heads, kv_heads, head_dim = (values[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        if not kv_heads or heads % kv_heads:
            raise UnsupportedModelError(fields.name("num_key_value_heads"), f"{kv_heads} does not divide {heads} heads")
        if not head_dim or head_dim % 8:
            raise UnsupportedModelError(
                fields.name("head_dim"), f"{head_dim} is not a multiple of 8, which attention computes in"
            )
        values.setdefault("attention_scale", head_dim**-0.5)
        if "ropes" not in values:
            rope = rope_of(fields, head_dim, interleaved=self.rotary == "interleaved") if self.rotary else None
            values["ropes"] = (rope,) * values["num_layers"]
        for rope in values["ropes"]:
            if rope is not None and rope.kind == "longrope":
                values["max_context"] = min(values["max_context"], rope.original_context)
        return Architecture(family=self.family, **values)

    def _common(self, fields: Fields) -> dict[str, Any]:
        num_layers, hidden_size = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        return {
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": fields.integer("intermediate_size", 4 * hidden_size),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
            "head_dim": fields.integer("head_dim", hidden_size // max(num_heads, 1)),
            "max_context": fields.integer("max_position_embeddings"),
            "norm_eps": fields.number("rms_norm_eps"),
            "activation": self.record.get("activation") or activation_of(fields, "hidden_act"),
            "tie_embeddings": fields.flag("tie_word_embeddings"),
            "sliding_window": self._sliding_window(fields, num_layers),
        }

    def _sliding_window(self, fields: Fields, num_layers: int) -> tuple[int | None, ...]:
        if self.sliding == "by_layer" and fields.flag("use_sliding_window"):
            return windows_by_layer(fields)
        if self.sliding == "always" and fields.get("sliding_window") is not None:
            return (fields.integer("sliding_window"),) * num_layers
        return (None,) * num_layers


def activation_of(fields: Fields, name: str) -> Activation:
    """The activation that a field names."""
    given = fields.get(name)
    activation = _ACTIVATIONS.get(str(given))
    if activation is None:
        raise UnsupportedModelError(fields.name(name), f"{given!r} is none of {sorted(_ACTIVATIONS)}")
    return activation
