"""DistilBERT: BERT with half the layers and no token types."""

from collections.abc import Mapping

from shared.policies.bert import ENCODER_RECORD
from shared.policies.fields import Fields
from shared.policies.names import affine, rows
from shared.policies.policy import Policy

_LAYER = "distilbert.transformer.layer.{layer}."
_ATTENTION = _LAYER + "attention."


def _rest(fields: Fields) -> Mapping[str, object]:
    return {"num_positions": fields.integer("max_position_embeddings")}


DISTILBERT = Policy(
    family="distilbert",
    kind="encoder",
    base="distilbert",
    ignored=(r".*position_ids", r"vocab_.*", r"(pre_)?classifier\..*", r"qa_outputs\..*"),
    fields={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_eps",
    },
    defaults={"activation": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512},
    record=ENCODER_RECORD,
    rest=_rest,
    rotary=None,
    names={
        "embedding": rows("distilbert.embeddings.word_embeddings.weight"),
        "positions": rows("distilbert.embeddings.position_embeddings.weight"),
        **affine("embedding_norm", "distilbert.embeddings.LayerNorm"),
        "qkv.weight": rows(*(f"{_ATTENTION}{part}_lin.weight" for part in "qkv")),
        "qkv.bias": rows(*(f"{_ATTENTION}{part}_lin.bias" for part in "qkv")),
        **affine("output", _ATTENTION + "out_lin"),
        **affine("attention_norm", _LAYER + "sa_layer_norm"),
        **affine("up", _LAYER + "ffn.lin1"),
        **affine("down", _LAYER + "ffn.lin2"),
        **affine("mlp_norm", _LAYER + "output_layer_norm"),
    },
)
