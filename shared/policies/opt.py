"""OPT: learned positions after two unused rows, norms before a sub-layer or, in the one of 350M, after it."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, either, lifted, product, rows
from shared.policies.policy import Policy, Setting

_DECODER = "model.decoder."
_LAYER = _DECODER + "layers.{layer}."
_EMBEDDING = _DECODER + "embed_tokens.weight"


def _rest(fields: Fields) -> Mapping[str, object]:
    fields.refuse("layer_norm_elementwise_affine", "norms without weights are not supported", unless=True)
    is_pre = fields.flag("do_layer_norm_before")
    is_projected = fields.integer("word_embed_proj_dim", fields.integer("hidden_size")) != fields.integer("hidden_size")
    return {
        "num_positions": fields.integer("max_position_embeddings") + 2,
        "position_offset": 2,
        "norm_order": "pre" if is_pre else "post",
        "final_norm": is_pre and not fields.flag("_remove_final_layer_norm"),
        # two projections make another output layer of a tied embedding than the embedding
        "tie_embeddings": fields.flag("tie_word_embeddings") and not is_projected,
    }


OPT = Policy(
    family="opt",
    base="model",
    fields={"intermediate_size": "ffn_dim", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_eps"},
    defaults={
        "activation_function": "relu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
        "tie_word_embeddings": True,
    },
    ignored=(r"lm_head\.weight",),
    record={**GPT_RECORD, **{name: Setting("enable_bias") for name in ("qkv_bias", "output_bias", "mlp_bias")}},
    rest=_rest,
    rotary=None,
    names={
        "embedding": either(product(_EMBEDDING, _DECODER + "project_in.weight"), rows(_EMBEDDING)),
        "positions": rows(_DECODER + "embed_positions.weight"),
        **affine("final_norm", _DECODER + "final_layer_norm"),
        "lm_head.weight": either(
            lifted("lm_head.weight", _DECODER + "project_out.weight"),
            lifted(_EMBEDDING, _DECODER + "project_out.weight"),
            rows("lm_head.weight"),
        ),
        **affine("attention_norm", _LAYER + "self_attn_layer_norm"),
        "qkv.weight": rows(*(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv")),
        "qkv.bias": rows(*(f"{_LAYER}self_attn.{part}_proj.bias" for part in "qkv")),
        **affine("output", _LAYER + "self_attn.out_proj"),
        **affine("mlp_norm", _LAYER + "final_layer_norm"),
        **affine("up", _LAYER + "fc1"),
        **affine("down", _LAYER + "fc2"),
    },
)
