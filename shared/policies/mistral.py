"""Mistral 7B and its descendants: Llama with a sliding window on every layer."""

from shared.policies.llama import LLAMA
from shared.policies.policy import Policy

MISTRAL = Policy(
    family="mistral",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    sliding="always",
    names=LLAMA.names,
)
