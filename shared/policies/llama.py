"""Llama 1 to 3, SmolLM and whatever else calls itself llama."""

from shared.policies.policy import Policy

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

LLAMA = Policy(
    family="llama",
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    qk_norm=False,
    sliding="never",
    names={
        "embedding": ("model.embed_tokens.weight",),
        "final_norm": ("model.norm.weight",),
        "lm_head": ("lm_head.weight",),
        "input_norm": ("model.layers.{layer}.input_layernorm.weight",),
        "qkv.weight": (_ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"),
        "qkv.bias": (_ATTENTION + "q_proj.bias", _ATTENTION + "k_proj.bias", _ATTENTION + "v_proj.bias"),
        "output.weight": (_ATTENTION + "o_proj.weight",),
        "output.bias": (_ATTENTION + "o_proj.bias",),
        "mlp_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
        "gate_up.weight": (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        "gate_up.bias": (_MLP + "gate_proj.bias", _MLP + "up_proj.bias"),
        "down.weight": (_MLP + "down_proj.weight",),
        "down.bias": (_MLP + "down_proj.bias",),
    },
)
