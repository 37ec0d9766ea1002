"""GPT-2: learned positions, LayerNorm, weights stored as [in, out]."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.names import affine, columns, rows
from shared.policies.policy import Policy

_LAYER = "transformer.h.{layer}."
# what GPT-2's descendants share
GPT_RECORD = {
    "norm": "layer",
    "norm_bias": True,
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}


def gpt_rest(fields: Fields) -> Mapping[str, object]:
    fields.refuse("scale_attn_by_inverse_layer_idx", "scores scaled by the layer's number are not supported")
    fields.refuse("add_cross_attention", "decoders of an encoder are not supported")
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    return {
        "num_positions": fields.integer("max_position_embeddings"),
        "attention_scale": head_dim**-0.5 if fields.flag("scale_attn_weights") else 1.0,
    }


GPT2 = Policy(
    family="gpt2",
    base="transformer",
    ignored=(r".*\.attn\.(bias|masked_bias)",),
    fields={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    record=GPT_RECORD,
    rest=gpt_rest,
    rotary=None,
    names={
        "embedding": rows("transformer.wte.weight"),
        "positions": rows("transformer.wpe.weight"),
        **affine("final_norm", "transformer.ln_f"),
        "lm_head.weight": rows("lm_head.weight"),
        **affine("attention_norm", _LAYER + "ln_1"),
        **affine("qkv", _LAYER + "attn.c_attn", columns),
        **affine("output", _LAYER + "attn.c_proj", columns),
        **affine("mlp_norm", _LAYER + "ln_2"),
        **affine("up", _LAYER + "mlp.c_fc", columns),
        **affine("down", _LAYER + "mlp.c_proj", columns),
    },
)
