"""Llama 1 to 3, SmolLM and whatever else calls itself llama."""

from shared.policies.names import affine, rows
from shared.policies.policy import Policy, Setting

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

LLAMA = Policy(
    family="llama",
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ignored=(r".*rotary_emb\.inv_freq",),
    record={
        "qkv_bias": Setting("attention_bias"),
        "output_bias": Setting("attention_bias"),
        "mlp_bias": Setting("mlp_bias"),
    },
    names={
        "embedding": rows("model.embed_tokens.weight"),
        "final_norm.weight": rows("model.norm.weight"),
        "lm_head.weight": rows("lm_head.weight"),
        "attention_norm.weight": rows(_LAYER + "input_layernorm.weight"),
        "qkv.weight": rows(*(f"{_ATTENTION}{part}_proj.weight" for part in "qkv")),
        "qkv.bias": rows(*(f"{_ATTENTION}{part}_proj.bias" for part in "qkv")),
        **affine("output", _ATTENTION + "o_proj"),
        "mlp_norm.weight": rows(_LAYER + "post_attention_layernorm.weight"),
        "up.weight": rows(_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        "up.bias": rows(_MLP + "gate_proj.bias", _MLP + "up_proj.bias"),
        **affine("down", _MLP + "down_proj"),
    },
)
