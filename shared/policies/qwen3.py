"""Qwen 3: queries and keys are normalised per head, and the head size is free of the hidden size."""

from shared.models.architecture import QkNorm
from shared.policies.llama import LLAMA
from shared.policies.names import rows
from shared.policies.policy import Policy, Setting

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
    record={
        "qkv_bias": Setting("attention_bias"),
        "output_bias": Setting("attention_bias"),
        "qk_norm": QkNorm("rms", bias=False, per_head=True, shared=True),
    },
    sliding="by_layer",
    names={
        **LLAMA.names,
        "q_norm.weight": rows("model.layers.{layer}.self_attn.q_norm.weight"),
        "k_norm.weight": rows("model.layers.{layer}.self_attn.k_norm.weight"),
    },
)
