"""OLMo 2: norms over what a sub-layer answers, and over all queries and all keys of a token."""

from shared.models.architecture import QkNorm
from shared.policies.llama import LLAMA
from shared.policies.names import rows
from shared.policies.policy import Policy, Setting

_LAYER = "model.layers.{layer}."

OLMO2 = Policy(
    family="olmo2",
    ignored=LLAMA.ignored,
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    record={
        "qkv_bias": Setting("attention_bias"),
        "output_bias": Setting("attention_bias"),
        "norm_order": "output",
        "qk_norm": QkNorm("rms", bias=False, per_head=False, shared=False),
    },
    names={
        **LLAMA.names,
        "attention_output_norm.weight": rows(_LAYER + "post_attention_layernorm.weight"),
        "mlp_output_norm.weight": rows(_LAYER + "post_feedforward_layernorm.weight"),
        "q_norm.weight": rows(_LAYER + "self_attn.q_norm.weight"),
        "k_norm.weight": rows(_LAYER + "self_attn.k_norm.weight"),
    },
)
