"""GPT-2 as Megatron-LM's checkpoints have it, by the flat names of shared/checkpoint/megatron.py."""

from dataclasses import replace

from shared.policies.gpt2 import GPT2
from shared.policies.names import affine, rows

_LAYER = "transformer.layers.{layer}."

# another layout of gpt2, not a family: the config is GPT-2's, the checkpoint's names choose between the two
MEGATRON_GPT2 = replace(
    GPT2,
    ignored=(r".*inv_freq",),
    names={
        "embedding": rows("word_embeddings.weight"),
        "positions": rows("position_embeddings.weight"),
        **affine("final_norm", "transformer.final_layernorm"),
        **affine("attention_norm", _LAYER + "input_layernorm"),
        **affine("qkv", _LAYER + "attention.query_key_value"),
        **affine("output", _LAYER + "attention.dense"),
        **affine("mlp_norm", _LAYER + "post_attention_layernorm"),
        **affine("up", _LAYER + "mlp.dense_h_to_4h"),
        **affine("down", _LAYER + "mlp.dense_4h_to_h"),
    },
)
