"""What the options' `moe` says of a model: its experts, where its own config does not, or the same as that."""

from __future__ import annotations

from collections.abc import Mapping

from shared.config.parallel import MoeConfig
from shared.models.architecture import Architecture
from shared.policies.gpt2 import GPT2
from shared.policies.megatron_moe import MEGATRON_MOE
from shared.policies.policy import Policy

_UNSAID = [1]  # DeepSpeed's default of moe_experts


def policy_with_experts(policy: Policy, moe: MoeConfig) -> Policy:
    """GPT-2 with experts is DeepSpeed-MoE's."""
    return MEGATRON_MOE if policy is GPT2 and moe.moe_experts != _UNSAID else policy


def fields_with_experts(policy: Policy, fields: Mapping[str, object], moe: MoeConfig) -> dict[str, object]:
    """A config that says nothing of its experts has them said by the options."""
    if policy is not MEGATRON_MOE:
        return dict(fields)
    return {"num_experts": moe.moe_experts, "mlp_type": moe.type, **fields}


def refuse_experts(moe: MoeConfig) -> None:
    """Of a model without the engine's layers. Raises ValueError naming an option that asks for something."""
    for name, value in _asked(moe).items():
        raise ValueError(f"moe.{name}: {value!r} is for a decoder's fused layers; set kernel_inject, or leave it out")


def check_experts(architecture: Architecture, moe: MoeConfig) -> None:
    """Raises ValueError naming an option that contradicts the model."""
    experts = architecture.experts
    if experts is None:
        for name, value in _asked(moe).items():
            raise ValueError(f"moe.{name}: {value!r}, and the model has no experts; leave it out")
        return
    if not moe.enabled:
        raise ValueError("moe.enabled: false, and the model has experts; leave it out")
    counts = [count for count in experts.counts if count]
    said = [count for count in moe.moe_experts if count > 1]
    if moe.moe_experts != _UNSAID and (said * len(counts) if len(moe.moe_experts) == 1 else said) != counts:
        raise ValueError(
            f"moe.moe_experts: {moe.moe_experts}, and the layers of the model's own config have {counts}; leave it out"
        )
    is_said = moe.type == "residual" or "type" in moe.model_fields_set
    if is_said and (moe.type == "residual") != experts.residual:
        own = "residual" if experts.residual else "standard"
        raise ValueError(f"moe.type: {moe.type!r}, and the model's own config says {own}; leave it out")


def _asked(moe: MoeConfig) -> dict[str, object]:
    """The options that are not at their defaults."""
    plain = {"ep_size": 1, "moe_experts": _UNSAID, "type": "standard", "ep_mp_group": None, "ep_group": None}
    return {name: value for name, default in plain.items() if (value := getattr(moe, name)) != default}
