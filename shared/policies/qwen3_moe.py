"""Qwen 3 with experts."""

from collections.abc import Mapping

from shared.policies.fields import Fields
from shared.policies.policy import Policy
from shared.policies.qwen2_moe import EXPERT_NAMES, experts_of
from shared.policies.qwen3 import QWEN3


def _rest(fields: Fields) -> Mapping[str, object]:
    # transformers 5 writes num_local_experts
    count = fields.integer("num_local_experts", fields.integer("num_experts", 128))
    window = fields.integer("sliding_window") if fields.flag("use_sliding_window") else None
    return {
        **experts_of(Fields({**fields.values, "num_experts": count}, fields.renamed), shared_size=0),
        "sliding_window": (window,) * fields.integer("num_hidden_layers"),
    }


QWEN3_MOE = Policy(
    family="qwen3_moe",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    record=QWEN3.record,
    rest=_rest,
    names={**QWEN3.names, **EXPERT_NAMES},
)
