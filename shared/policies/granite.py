"""Granite: Llama with factors on the embedding, the scores, each sub-layer's answer and the logits."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.llama import LLAMA
from shared.policies.policy import Policy


def _rest(fields: Fields) -> Mapping[str, object]:
    return {
        "embedding_scale": fields.number("embedding_multiplier", 1.0),
        "attention_scale": fields.number("attention_multiplier", 1.0),
        "output_scale": fields.number("residual_multiplier", 1.0),
        "logit_scale": 1.0 / fields.number("logits_scaling", 1.0),
    }


GRANITE = Policy(
    family="granite",
    ignored=LLAMA.ignored,
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    record=LLAMA.record,
    rest=_rest,
    names=LLAMA.names,
)
