"""Gemma 2: norms on both sides of a sub-layer, capped scores and logits, every second layer with a window."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.gemma import BIASES, GEMMA, scaled_embedding
from shared.policies.llama import LLAMA
from shared.policies.names import rows
from shared.policies.policy import Policy
from shared.policies.positions import windows_by_layer

_LAYER = "model.layers.{layer}."
SANDWICH_NAMES = {
    **LLAMA.names,
    "attention_output_norm.weight": rows(_LAYER + "post_attention_layernorm.weight"),
    "mlp_norm.weight": rows(_LAYER + "pre_feedforward_layernorm.weight"),
    "mlp_output_norm.weight": rows(_LAYER + "post_feedforward_layernorm.weight"),
}


def caps_and_scales(fields: Fields) -> Mapping[str, object]:
    """Of Gemma 2 and 3."""
    return {
        **scaled_embedding(fields),
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "attention_cap": fields.optional_number("attn_logit_softcapping"),
        "logit_cap": fields.optional_number("final_logit_softcapping"),
    }


def _rest(fields: Fields) -> Mapping[str, object]:
    values = dict(caps_and_scales(fields))
    if fields.get("layer_types") is None:  # as transformers 4 wrote it: the first layer has a window
        window, num_layers = fields.integer("sliding_window"), fields.integer("num_hidden_layers")
        return {**values, "sliding_window": tuple(None if layer % 2 else window for layer in range(num_layers))}
    return {**values, "sliding_window": windows_by_layer(fields)}


GEMMA2 = Policy(
    family="gemma2",
    fields={"hidden_act": "hidden_activation"},
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    record={**BIASES, **GEMMA.record, "norm_order": "sandwich"},
    rest=_rest,
    names=SANDWICH_NAMES,
)
