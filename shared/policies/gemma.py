"""Gemma: Llama with norms that multiply by 1 + weight and an embedding scaled by the root of its width."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.llama import LLAMA
from shared.policies.policy import Policy, Setting

BIASES = {name: Setting("attention_bias") for name in ("qkv_bias", "output_bias")}


def scaled_embedding(fields: Fields) -> Mapping[str, object]:
    """Of every Gemma."""
    fields.refuse("use_bidirectional_attention", "tokens that see those after them are not supported")
    return {"embedding_scale": fields.integer("hidden_size") ** 0.5}


GEMMA = Policy(
    family="gemma",
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    record={**BIASES, "norm_offset": 1.0},
    rest=scaled_embedding,
    names=LLAMA.names,
)
