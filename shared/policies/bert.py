"""BERT and RoBERTa: encoders with norms after each sub-layer. RoBERTa counts positions from its padding token on."""

from collections.abc import Mapping

from shared.policies.fields import Fields, UnsupportedModelError
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import affine, rows
from shared.policies.policy import Policy

_LAYER = "bert.encoder.layer.{layer}."
_ATTENTION = _LAYER + "attention."
_EMBEDDINGS = "bert.embeddings."
# what encoders of BERT's kind share
ENCODER_RECORD = {
    **GPT_RECORD,
    "norm_order": "post",
    "final_norm": False,
    "embedding_norm": True,
    "causal": False,
    "lm_head": False,
}


def _rest(fields: Fields) -> Mapping[str, object]:
    fields.refuse("is_decoder", "BERT as a decoder is not supported")
    if (kind := fields.get("position_embedding_type", "absolute")) != "absolute":
        raise UnsupportedModelError("position_embedding_type", f"{kind!r} is not supported: absolute is")
    return {
        "num_positions": fields.integer("max_position_embeddings"),
        "token_types": fields.integer("type_vocab_size"),
    }


def _rest_of_roberta(fields: Fields) -> Mapping[str, object]:
    offset, rows_of_table = fields.integer("pad_token_id") + 1, fields.integer("max_position_embeddings")
    return {**_rest(fields), "position_offset": offset, "max_context": rows_of_table - offset}


BERT = Policy(
    family="bert",
    kind="encoder",
    base="bert",
    ignored=(r".*position_ids", r"cls\..*", r"classifier\..*", r"qa_outputs\..*", r"(bert\.)?pooler\..*"),
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    },
    record=ENCODER_RECORD,
    rest=_rest,
    rotary=None,
    names={
        "embedding": rows(_EMBEDDINGS + "word_embeddings.weight"),
        "positions": rows(_EMBEDDINGS + "position_embeddings.weight"),
        "token_types": rows(_EMBEDDINGS + "token_type_embeddings.weight"),
        **affine("embedding_norm", _EMBEDDINGS + "LayerNorm"),
        "qkv.weight": rows(*(f"{_ATTENTION}self.{part}.weight" for part in ("query", "key", "value"))),
        "qkv.bias": rows(*(f"{_ATTENTION}self.{part}.bias" for part in ("query", "key", "value"))),
        **affine("output", _ATTENTION + "output.dense"),
        **affine("attention_norm", _ATTENTION + "output.LayerNorm"),
        **affine("up", _LAYER + "intermediate.dense"),
        **affine("down", _LAYER + "output.dense"),
        **affine("mlp_norm", _LAYER + "output.LayerNorm"),
    },
)

ROBERTA = Policy(
    family="roberta",
    kind="encoder",
    base="roberta",
    ignored=(r".*position_ids", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*", r"(roberta\.)?pooler\..*"),
    fields=BERT.fields,
    defaults={**BERT.defaults, "pad_token_id": 1},
    record=ENCODER_RECORD,
    rest=_rest_of_roberta,
    rotary=None,
    names={
        ours: rows(*(name.replace("bert.", "roberta.", 1) for name in sources[0].names))
        for ours, sources in BERT.names.items()
    },
)
