"""GPT-NeoX and Pythia: attention and MLP side by side, each behind a LayerNorm of its own."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, either, grouped, rows
from shared.policies.policy import Policy, Setting
from shared.policies.positions import rope_of

_LAYER = "gpt_neox.layers.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    old = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # as transformers 4 wrote it
    rope = rope_of(Fields(fields.values, {**fields.renamed, **old}), head_dim)
    return {"ropes": (rope,) * fields.integer("num_hidden_layers")}


GPT_NEOX = Policy(
    family="gpt_neox",
    base="gpt_neox",
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    record={
        **GPT_RECORD,
        "qkv_bias": Setting("attention_bias"),
        "output_bias": Setting("attention_bias"),
        "parallel": Setting("use_parallel_residual"),
        "parallel_norms": True,
    },
    rest=_rest,
    names={
        "embedding": rows("gpt_neox.embed_in.weight"),
        **affine("final_norm", "gpt_neox.final_layer_norm"),
        "lm_head.weight": either(rows("embed_out.weight"), rows("lm_head.weight")),
        **affine("attention_norm", _LAYER + "input_layernorm"),
        **affine("qkv", _LAYER + "attention.query_key_value", grouped),
        **affine("output", _LAYER + "attention.dense"),
        **affine("mlp_norm", _LAYER + "post_attention_layernorm"),
        **affine("up", _LAYER + "mlp.dense_h_to_4h"),
        **affine("down", _LAYER + "mlp.dense_4h_to_h"),
    },
)
