"""Qwen, the first: Llama's layers under other names, query, key and value in one projection with a bias."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.names import affine, rows
from shared.policies.policy import Policy
from shared.policies.positions import rope_of

_LAYER = "transformer.h.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    heads, head_dim = fields.integer("num_attention_heads"), fields.integer("kv_channels", 128)
    part = fields.number("rotary_pct", 1.0)
    rope = rope_of(
        Fields(
            {
                "rope_theta": fields.number("rotary_emb_base", 10_000.0),
                "partial_rotary_factor": part,
                "max_position_embeddings": fields.integer("max_position_embeddings"),
            }
        ),
        head_dim,
    )
    return {
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        # the config counts gate and up together
        "intermediate_size": fields.integer("intermediate_size") // 2,
        "ropes": (rope,) * fields.integer("num_hidden_layers"),
    }


# its log-n attention and NTK scaling set in beyond seq_length, which is what max_context is
QWEN = Policy(
    family="qwen",
    base="transformer",
    ignored=(r".*rotary_emb\.inv_freq",),
    fields={"rms_norm_eps": "layer_norm_epsilon", "max_position_embeddings": "seq_length"},
    defaults={"layer_norm_epsilon": 1e-6, "seq_length": 8192},
    record={"qkv_bias": True, "activation": "silu"},
    rest=_rest,
    names={
        "embedding": rows("transformer.wte.weight"),
        "final_norm.weight": rows("transformer.ln_f.weight"),
        "lm_head.weight": rows("lm_head.weight"),
        "attention_norm.weight": rows(_LAYER + "ln_1.weight"),
        **affine("qkv", _LAYER + "attn.c_attn"),
        "output.weight": rows(_LAYER + "attn.c_proj.weight"),
        "mlp_norm.weight": rows(_LAYER + "ln_2.weight"),
        "up.weight": rows(_LAYER + "mlp.w2.weight", _LAYER + "mlp.w1.weight"),
        "down.weight": rows(_LAYER + "mlp.c_proj.weight"),
    },
)
