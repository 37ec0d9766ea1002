"""Qwen 2 and 2.5: biases on query, key and value."""

from shared.policies.llama import LLAMA
from shared.policies.policy import Policy

QWEN2 = Policy(
    family="qwen2",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    record={"qkv_bias": True},
    sliding="by_layer",
    names=LLAMA.names,
)
