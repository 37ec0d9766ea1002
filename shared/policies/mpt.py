"""MPT: ALiBi, no biases anywhere."""

from collections.abc import Mapping

from shared.policies.fields import Fields, UnsupportedModelError
from shared.policies.names import rows
from shared.policies.policy import Policy
from shared.policies.positions import mpt_slopes

_LAYER = "transformer.blocks.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    attention = fields.table("attn_config")
    heads = fields.integer("num_attention_heads")
    if not attention.flag("alibi", True):
        raise UnsupportedModelError("attn_config.alibi", "positions by other means than ALiBi are not supported")
    attention.refuse("qk_ln", "normalised queries and keys are not supported")
    attention.refuse("prefix_lm", "prefixes that see what follows them are not supported")
    values: dict[str, object] = {
        "intermediate_size": fields.integer("hidden_size") * fields.integer("expansion_ratio", 4),
        "alibi_slopes": mpt_slopes(heads, attention.number("alibi_bias_max", 8)),
        "qkv_clip": attention.optional_number("clip_qkv") or None,
    }
    if attention.get("softmax_scale") is not None:
        values["attention_scale"] = attention.number("softmax_scale")
    return values


MPT = Policy(
    family="mpt",
    base="transformer",
    fields={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "max_seq_len": 2048,
        "expansion_ratio": 4,
        "tie_word_embeddings": True,
    },
    record={"norm": "layer", "gated": False, "activation": "gelu"},
    rest=_rest,
    rotary=None,
    names={
        "embedding": rows("transformer.wte.weight"),
        "final_norm.weight": rows("transformer.norm_f.weight"),
        "lm_head.weight": rows("lm_head.weight"),
        "attention_norm.weight": rows(_LAYER + "norm_1.weight"),
        "qkv.weight": rows(_LAYER + "attn.Wqkv.weight"),
        "output.weight": rows(_LAYER + "attn.out_proj.weight"),
        "mlp_norm.weight": rows(_LAYER + "norm_2.weight"),
        "up.weight": rows(_LAYER + "ffn.up_proj.weight"),
        "down.weight": rows(_LAYER + "ffn.down_proj.weight"),
    },
)
