"""Falcon, new and old: rope or ALiBi, one key-value head, some or all, attention beside the MLP or before it."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, either, grouped, rows
from shared.policies.policy import Policy, Setting
from shared.policies.positions import alibi_slopes, rope_of

_LAYER = "transformer.h.{layer}."


def _rest(fields: Fields) -> Mapping[str, object]:
    heads, layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    head_dim = fields.integer("hidden_size") // heads
    is_new, is_parallel = fields.flag("new_decoder_architecture"), fields.flag("parallel_attn")
    shared = 1 if fields.flag("multi_query") else heads
    values: dict[str, object] = {
        "num_kv_heads": fields.integer("num_kv_heads", heads) if is_new else shared,
        "parallel": is_new or is_parallel,
        "parallel_norms": is_new and fields.integer("num_ln_in_parallel_attn", 2) == 2,
        "ropes": (None,) * layers,
    }
    if fields.flag("alibi"):
        # it scales scores with their bias
        return {**values, "alibi_slopes": alibi_slopes(heads, head_dim**-0.5)}
    return {**values, "ropes": (rope_of(fields, head_dim),) * layers}


FALCON = Policy(
    family="falcon",
    base="transformer",
    ignored=(r".*rotary(_emb)?\.inv_freq",),
    fields={
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": "num_attention_heads",  # num_kv_heads counts in the new architecture alone
    },
    defaults={
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "multi_query": True,
        "parallel_attn": True,
        "tie_word_embeddings": True,
    },
    record={**GPT_RECORD, **{name: Setting("bias") for name in ("qkv_bias", "output_bias", "mlp_bias")}},
    rest=_rest,
    names={
        "embedding": rows("transformer.word_embeddings.weight"),
        **affine("final_norm", "transformer.ln_f"),
        "lm_head.weight": rows("lm_head.weight"),
        **affine("qkv", _LAYER + "self_attention.query_key_value", grouped),
        **affine("output", _LAYER + "self_attention.dense"),
        **affine("up", _LAYER + "mlp.dense_h_to_4h"),
        **affine("down", _LAYER + "mlp.dense_4h_to_h"),
        **{
            f"{ours}.{kind}": either(rows(f"{_LAYER}{new}.{kind}"), rows(f"{_LAYER}{old}.{kind}"))
            for ours, new, old in (
                ("attention_norm", "ln_attn", "input_layernorm"),
                ("mlp_norm", "ln_mlp", "post_attention_layernorm"),
            )
            for kind in ("weight", "bias")
        },
    },
)
