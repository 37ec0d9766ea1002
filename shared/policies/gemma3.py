"""Gemma 3, the text model: Gemma 2 with normalised queries and keys in place of caps, and two ropes."""

from collections.abc import Mapping

from shared.models.architecture import QkNorm
from shared.policies.fields import Fields
from shared.policies.gemma2 import GEMMA2, SANDWICH_NAMES, caps_and_scales
from shared.policies.names import rows
from shared.policies.policy import Policy
from shared.policies.positions import rope_of

_KINDS = ("sliding_attention", "full_attention")


def _rest(fields: Fields) -> Mapping[str, object]:
    num_layers, window = fields.integer("num_hidden_layers"), fields.integer("sliding_window")
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    types = fields.per_layer("layer_types", _KINDS) or tuple(
        _KINDS[(layer + 1) % pattern == 0] for layer in range(num_layers)
    )
    head_dim = fields.integer("head_dim")
    if fields.get("rope_local_base_freq") is not None:  # as transformers 4 wrote it
        local = Fields({"rope_theta": fields.number("rope_local_base_freq"), "max_position_embeddings": 1})
        ropes = {_KINDS[0]: rope_of(local, head_dim), _KINDS[1]: rope_of(fields, head_dim)}
    else:
        ropes = {kind: rope_of(fields, head_dim, layer_type=kind) for kind in _KINDS}
    return {
        **caps_and_scales(fields),
        "ropes": tuple(ropes[kind] for kind in types),
        "sliding_window": tuple(window if kind == _KINDS[0] else None for kind in types),
    }


GEMMA3 = Policy(
    family="gemma3_text",
    fields=GEMMA2.fields,
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    record={**GEMMA2.record, "qk_norm": QkNorm("rms", bias=False, per_head=True, shared=True)},
    rest=_rest,
    names={
        **SANDWICH_NAMES,
        "q_norm.weight": rows("model.layers.{layer}.self_attn.q_norm.weight"),
        "k_norm.weight": rows("model.layers.{layer}.self_attn.k_norm.weight"),
    },
)
