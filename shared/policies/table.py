"""The families Tandem serves, by config.json's `model_type`. A new one is a table of its own and a line here."""

from shared.models.architecture import Architecture
from shared.policies.llama import LLAMA
from shared.policies.mistral import MISTRAL
from shared.policies.policy import Config, Policy, UnsupportedModelError
from shared.policies.qwen2 import QWEN2
from shared.policies.qwen3 import QWEN3

POLICIES = {policy.family: policy for policy in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def policy_for(config: Config) -> Policy:
    """The policy of a parsed config.json; UnsupportedModelError for a family that has none."""
    model_type = config.get("model_type")
    policy = POLICIES.get(str(model_type))
    if policy is None:
        raise UnsupportedModelError("model_type", f"{model_type!r} is none of {', '.join(sorted(POLICIES))}")
    return policy


def architecture_of(config: Config) -> Architecture:
    """The architecture record of a parsed config.json; UnsupportedModelError names the field that cannot be served."""
    return policy_for(config).architecture(config)
