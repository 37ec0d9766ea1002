"""GPT-J: attention and MLP side by side behind one LayerNorm, neighbours that turn together, a bias on the logits."""

from collections.abc import Mapping

from shared.models.architecture import Rope
from shared.policies.fields import Fields
from shared.policies.gpt2 import GPT2, GPT_RECORD
from shared.policies.names import affine, rows
from shared.policies.policy import Policy

_LAYER = "transformer.h.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    rope = Rope(10_000.0, fields.integer("rotary_dim", head_dim), interleaved=True)
    return {"ropes": (rope,) * fields.integer("num_hidden_layers")}


GPTJ = Policy(
    family="gptj",
    base="transformer",
    ignored=(r".*\.attn\.(bias|masked_bias|embed_positions)",),
    fields=GPT2.fields,
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_positions": 2048, "rotary_dim": 64},
    record={**GPT_RECORD, "parallel": True, "qkv_bias": False, "output_bias": False, "lm_head_bias": True},
    rest=_rest,
    names={
        "embedding": rows("transformer.wte.weight"),
        **affine("final_norm", "transformer.ln_f"),
        **affine("lm_head", "lm_head"),
        **affine("attention_norm", _LAYER + "ln_1"),
        "qkv.weight": rows(*(f"{_LAYER}attn.{part}_proj.weight" for part in "qkv")),
        "output.weight": rows(_LAYER + "attn.out_proj.weight"),
        **affine("up", _LAYER + "mlp.fc_in"),
        **affine("down", _LAYER + "mlp.fc_out"),
    },
)
