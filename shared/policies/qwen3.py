"""Qwen 3: queries and keys are normalised per head, and the head size is free of the hidden size."""

from shared.policies.llama import LLAMA
from shared.policies.policy import Policy

QWEN3 = Policy(
    family="qwen3",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    qk_norm=True,
    sliding="by_layer",
    names={
        **LLAMA.names,
        "q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
        "k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
    },
)
