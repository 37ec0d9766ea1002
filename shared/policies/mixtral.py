"""Mixtral: Mistral with experts in the place of each MLP."""

from collections.abc import Mapping

from shared.models.architecture import Experts
from shared.policies.fields import Fields
from shared.policies.llama import LLAMA
from shared.policies.names import either, rows, stacked
from shared.policies.policy import Policy

_OLD = "model.layers.{layer}.block_sparse_moe."
_EXPERT = _OLD + "experts.{expert}."
_MLP = "model.layers.{layer}.mlp."


def _rest(fields: Fields) -> Mapping[str, object]:
    experts = Experts(
        counts=(fields.integer("num_local_experts"),) * fields.integer("num_hidden_layers"),
        per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size"),
        renormalize=True,
    )
    return {"experts": experts}


MIXTRAL = Policy(
    family="mixtral",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    sliding="always",
    rest=_rest,
    names={
        **LLAMA.names,
        "router.weight": either(rows(_OLD + "gate.weight"), rows(_MLP + "gate.weight")),
        "experts_up.weight": either(
            rows(_EXPERT + "w1.weight", _EXPERT + "w3.weight"), stacked(_MLP + "experts.gate_up_proj")
        ),
        "experts_down.weight": either(rows(_EXPERT + "w2.weight"), stacked(_MLP + "experts.down_proj")),
    },
)
