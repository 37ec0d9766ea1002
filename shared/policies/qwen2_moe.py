"""Qwen 2 with experts: beside those that a token goes to, one that every token goes through."""

from collections.abc import Mapping

from shared.models.architecture import Experts
from shared.policies.fields import Fields
from shared.policies.llama import LLAMA
from shared.policies.names import either, rows, stacked
from shared.policies.policy import Policy, Setting

_MLP = "model.layers.{layer}.mlp."
_EXPERT = _MLP + "experts.{expert}."
EXPERT_NAMES = {
    "router.weight": rows(_MLP + "gate.weight"),
    "experts_up.weight": either(
        rows(_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"), stacked(_MLP + "experts.gate_up_proj")
    ),
    "experts_down.weight": either(rows(_EXPERT + "down_proj.weight"), stacked(_MLP + "experts.down_proj")),
}


def experts_of(fields: Fields, shared_size: int) -> Mapping[str, object]:
    """Experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    num_layers, count = fields.integer("num_hidden_layers"), fields.integer("num_experts")
    step, dense = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    if not count:
        return {}
    sparse = (layer not in dense and step > 0 and (layer + 1) % step == 0 for layer in range(num_layers))
    experts = Experts(
        counts=tuple(count * is_sparse for is_sparse in sparse),
        per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
        shared_size=shared_size,
    )
    return {"experts": experts}


def _rest(fields: Fields) -> Mapping[str, object]:
    return experts_of(fields, fields.integer("shared_expert_intermediate_size"))


QWEN2_MOE = Policy(
    family="qwen2_moe",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    record={"qkv_bias": Setting("qkv_bias")},
    sliding="by_layer",
    rest=_rest,
    names={
        **LLAMA.names,
        **EXPERT_NAMES,
        "shared_up.weight": rows(_MLP + "shared_expert.gate_proj.weight", _MLP + "shared_expert.up_proj.weight"),
        "shared_down.weight": rows(_MLP + "shared_expert.down_proj.weight"),
        "shared_gate.weight": rows(_MLP + "shared_expert_gate.weight"),
    },
)
