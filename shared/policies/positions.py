"""What a config says of positions: rotary embedding with its scaling, ALiBi, windows. Free of torch."""

from __future__ import annotations

import math

from shared.models.architecture import Rope
from shared.policies.fields import Fields, UnsupportedModelError


def rope_of(fields: Fields, head_dim: int, *, interleaved: bool = False, layer_type: str | None = None) -> Rope:
    """transformers 5 writes `rope_parameters`, 4 wrote `rope_scaling` and `rope_theta` beside it.

    layer_type: whose parameters, of a config that has some for each type of layers; None: they have to be alike.
    """
    field = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.table(field)
    nested = {key: value for key, value in given.values.items() if isinstance(value, dict)}
    if nested:
        chosen = nested.get(layer_type or next(iter(nested)))
        if chosen is None or (layer_type is None and any(value != chosen for value in nested.values())):
            raise UnsupportedModelError(field, "differs between layer types, which this family does not have")
        given = Fields(chosen, prefix=f"{field}.")
    part = given.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * part)
    if dim % 2 or not 0 < dim <= head_dim:
        raise UnsupportedModelError(
            fields.name("partial_rotary_factor"), f"{part} of {head_dim} dimensions is not an even number of them"
        )
    theta = given.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    max_context = fields.integer("max_position_embeddings")
    original = fields.integer(
        "original_max_position_embeddings", given.integer("original_max_position_embeddings", max_context)
    )
    # dynamic: its frequencies change beyond the model's own context, which no sequence passes here
    if kind in ("default", "dynamic"):
        return Rope(theta, dim, interleaved=interleaved)
    if kind == "linear":
        return Rope(theta, dim, "linear", interleaved, factor=given.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            dim,
            "llama3",
            interleaved,
            factor=given.number("factor"),
            original_context=original,
            low_frequency_factor=given.number("low_freq_factor"),
            high_frequency_factor=given.number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = given.number("factor", max_context / original)
        return Rope(
            theta,
            dim,
            "yarn",
            interleaved,
            factor=factor,
            original_context=original,
            beta_fast=given.number("beta_fast", 32.0) or 32.0,
            beta_slow=given.number("beta_slow", 1.0) or 1.0,
            truncate=given.flag("truncate", True),
            attention_factor=given.number("attention_factor", _yarn_attention_factor(factor, given)),
        )
    if kind in ("longrope", "su"):
        return _longrope(given, theta, dim, original, max_context)
    raise UnsupportedModelError(
        f"{field}.rope_type", f"{kind!r} is not supported: default, linear, dynamic, llama3, yarn and longrope are"
    )


def _longrope(given: Fields, theta: float, dim: int, original: int, max_context: int) -> Rope:
    """The factors of short sequences: `original` tokens is as far as they serve, and what max_context then is."""
    factor = given.number("factor", max_context / original)
    factors = given.numbers("short_factor")
    if len(factors) != dim // 2:
        raise UnsupportedModelError(given.name("short_factor"), f"wants {dim // 2} numbers, has {len(factors)}")
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        theta,
        dim,
        "longrope",
        factors=factors,
        original_context=original,
        attention_factor=given.number("attention_factor", attention),
    )


def _yarn_attention_factor(factor: float, given: Fields) -> float:
    """What yarn multiplies cos and sin by when the model does not say: 0.1 ln(factor) + 1."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def alibi_slopes(num_heads: int, scale: float = 1.0) -> tuple[float, ...]:
    """Slopes of BLOOM and Falcon: a geometric series of the nearest smaller power of two heads, the rest between.

    https://arxiv.org/abs/2108.12409, https://huggingface.co/bigscience/bloom
    """
    power = 1 << int(math.log2(num_heads))
    first = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    slopes = [first ** (i + 1) for i in range(power)]
    if power < num_heads:
        between = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
        slopes += [between ** (2 * i + 1) for i in range(num_heads - power)]
    return tuple(slope * scale for slope in slopes)


def mpt_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """Slopes of MPT: those of the next power of two heads, every second one first."""
    power = 1 << math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -((i + 1) * bias_max / power) for i in range(power)]
    return tuple(slopes if power == num_heads else [*slopes[1::2], *slopes[::2]][:num_heads])


def windows_by_layer(fields: Fields) -> tuple[int | None, ...]:
    """By `layer_types`, else from `max_window_layers` on, if `use_sliding_window` says so."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window") if fields.get("sliding_window") is not None else None
    types = fields.per_layer("layer_types", ("full_attention", "sliding_attention"))
    if types is None:
        first = fields.integer("max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return tuple(window if kind == "sliding_attention" else None for kind in types)
