"""GPT-Neo: GPT-2 with scores that are not scaled, and local windows on some layers."""

from collections.abc import Mapping

from shared.policies.fields import Fields, UnsupportedModelError
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, rows
from shared.policies.policy import Policy

_LAYER = "transformer.h.{layer}."
_ATTENTION = _LAYER + "attn.attention."


def _rest(fields: Fields) -> Mapping[str, object]:
    num_layers, window = fields.integer("num_hidden_layers"), fields.integer("window_size")
    groups = fields.get("attention_types", [[["global", "local"], num_layers // 2]])
    try:
        kinds = [kind for pattern, times in groups for kind in pattern * times]  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError):
        raise UnsupportedModelError("attention_types", f"wants [[kinds, times], ...], has {groups!r}") from None
    if len(kinds) != num_layers or not {"global", "local"}.issuperset(kinds):
        raise UnsupportedModelError("attention_types", f"wants global or local for each of {num_layers} layers")
    return {
        "num_positions": fields.integer("max_position_embeddings"),
        "attention_scale": 1.0,
        "sliding_window": tuple(window if kind == "local" else None for kind in kinds),
    }


GPT_NEO = Policy(
    family="gpt_neo",
    base="transformer",
    ignored=(r".*\.attn\.attention\.(bias|masked_bias)",),
    fields={
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "window_size": 256,
        "tie_word_embeddings": True,
    },
    record={**GPT_RECORD, "qkv_bias": False},
    rest=_rest,
    rotary=None,
    names={
        "embedding": rows("transformer.wte.weight"),
        "positions": rows("transformer.wpe.weight"),
        **affine("final_norm", "transformer.ln_f"),
        "lm_head.weight": rows("lm_head.weight"),
        **affine("attention_norm", _LAYER + "ln_1"),
        "qkv.weight": rows(*(f"{_ATTENTION}{part}_proj.weight" for part in "qkv")),
        **affine("output", _ATTENTION + "out_proj"),
        **affine("mlp_norm", _LAYER + "ln_2"),
        **affine("up", _LAYER + "mlp.c_fc"),
        **affine("down", _LAYER + "mlp.c_proj"),
    },
)
