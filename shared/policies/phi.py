"""Phi 1 to 2: attention and MLP side by side behind one LayerNorm, heads that turn in part."""

from collections.abc import Mapping

from shared.models.architecture import QkNorm
from shared.policies.fields import Fields
from shared.policies.names import affine, rows
from shared.policies.policy import Policy

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."


def _rest(fields: Fields) -> Mapping[str, object]:
    if not fields.flag("qk_layernorm"):
        return {}
    return {"qk_norm": QkNorm("layer", bias=True, per_head=True, shared=True)}


PHI = Policy(
    family="phi",
    ignored=(r".*rotary_emb\.inv_freq",),
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
    },
    record={
        "norm": "layer",
        "norm_bias": True,
        "parallel": True,
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    },
    rest=_rest,
    names={
        "embedding": rows("model.embed_tokens.weight"),
        **affine("final_norm", "model.final_layernorm"),
        **affine("lm_head", "lm_head"),
        **affine("attention_norm", _LAYER + "input_layernorm"),
        "qkv.weight": rows(*(f"{_ATTENTION}{part}_proj.weight" for part in "qkv")),
        "qkv.bias": rows(*(f"{_ATTENTION}{part}_proj.bias" for part in "qkv")),
        **affine("q_norm", _ATTENTION + "q_layernorm"),
        **affine("k_norm", _ATTENTION + "k_layernorm"),
        **affine("output", _ATTENTION + "dense"),
        **affine("up", _LAYER + "mlp.fc1"),
        **affine("down", _LAYER + "mlp.fc2"),
    },
)
