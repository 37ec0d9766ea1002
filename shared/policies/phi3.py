"""Phi 3 and 4: Llama with its projections fused in the checkpoint, and rope scaled in the long variants."""

from shared.policies.llama import LLAMA
from shared.policies.names import rows
from shared.policies.policy import Policy

PHI3 = Policy(
    family="phi3",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    ignored=LLAMA.ignored,
    sliding="always",
    names={
        **LLAMA.names,
        "qkv.weight": rows("model.layers.{layer}.self_attn.qkv_proj.weight"),
        "up.weight": rows("model.layers.{layer}.mlp.gate_up_proj.weight"),
    },
)
