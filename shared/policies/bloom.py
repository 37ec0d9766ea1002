"""BLOOM: ALiBi, and a LayerNorm over the embedding."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, grouped, rows
from shared.policies.policy import Policy, Setting
from shared.policies.positions import alibi_slopes

_LAYER = "transformer.h.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    return {"alibi_slopes": alibi_slopes(fields.integer("num_attention_heads"))}


BLOOM = Policy(
    family="bloom",
    base="transformer",
    fields={
        "hidden_size": ("hidden_size", "n_embed"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "rms_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "seq_length",
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,  # what it was trained on; ALiBi itself knows no end
        "tie_word_embeddings": True,
    },
    record={
        **GPT_RECORD,
        "activation": "gelu_tanh",
        "embedding_norm": True,
        "stream_of_norm": Setting("apply_residual_connection_post_layernorm"),
    },
    rest=_rest,
    rotary=None,
    names={
        "embedding": rows("transformer.word_embeddings.weight"),
        **affine("embedding_norm", "transformer.word_embeddings_layernorm"),
        **affine("final_norm", "transformer.ln_f"),
        "lm_head.weight": rows("lm_head.weight"),
        **affine("attention_norm", _LAYER + "input_layernorm"),
        **affine("qkv", _LAYER + "self_attention.query_key_value", grouped),
        **affine("output", _LAYER + "self_attention.dense"),
        **affine("mlp_norm", _LAYER + "post_attention_layernorm"),
        **affine("up", _LAYER + "mlp.dense_h_to_4h"),
        **affine("down", _LAYER + "mlp.dense_4h_to_h"),
    },
)
