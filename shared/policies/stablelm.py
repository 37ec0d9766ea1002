"""StableLM: Llama with LayerNorm and heads that turn in part."""

from collections.abc import Mapping

from shared.models.architecture import QkNorm
from shared.policies.fields import Fields
from shared.policies.llama import LLAMA
from shared.policies.names import affine, rows
from shared.policies.policy import Policy, Setting

_LAYER = "model.layers.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    if not fields.flag("qk_layernorm"):
        return {}
    return {"qk_norm": QkNorm("layer", bias=False, per_head=True, shared=False)}


STABLELM = Policy(
    family="stablelm",
    ignored=LLAMA.ignored,
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
    },
    record={
        "norm": "layer",
        "norm_bias": True,
        "qkv_bias": Setting("use_qkv_bias"),
        "parallel": Setting("use_parallel_residual"),
    },
    rest=_rest,
    names={
        **LLAMA.names,
        **affine("final_norm", "model.norm"),
        **affine("attention_norm", _LAYER + "input_layernorm"),
        **affine("mlp_norm", _LAYER + "post_attention_layernorm"),
        "q_norm.weight": rows(_LAYER + "self_attn.q_layernorm.norms.{head}.weight"),
        "k_norm.weight": rows(_LAYER + "self_attn.k_layernorm.norms.{head}.weight"),
    },
)
