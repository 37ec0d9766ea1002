"""The families Tandem serves, by config.json's `model_type`. A new one is a table of its own and a line here."""

from shared.models.architecture import Architecture
from shared.policies.bert import BERT, ROBERTA
from shared.policies.bloom import BLOOM
from shared.policies.clip import CLIP_TEXT, CLIP_VISION
from shared.policies.distilbert import DISTILBERT
from shared.policies.falcon import FALCON
from shared.policies.gemma import GEMMA
from shared.policies.gemma2 import GEMMA2
from shared.policies.gemma3 import GEMMA3
from shared.policies.gpt2 import GPT2
from shared.policies.gpt_neo import GPT_NEO
from shared.policies.gpt_neox import GPT_NEOX
from shared.policies.gptj import GPTJ
from shared.policies.granite import GRANITE
from shared.policies.llama import LLAMA
from shared.policies.megatron_moe import MEGATRON_MOE
from shared.policies.mistral import MISTRAL
from shared.policies.mixtral import MIXTRAL
from shared.policies.mpt import MPT
from shared.policies.olmo2 import OLMO2
from shared.policies.opt import OPT
from shared.policies.phi import PHI
from shared.policies.phi3 import PHI3
from shared.policies.policy import Config, Policy, UnsupportedModelError
from shared.policies.qwen import QWEN
from shared.policies.qwen2 import QWEN2
from shared.policies.qwen2_moe import QWEN2_MOE
from shared.policies.qwen3 import QWEN3
from shared.policies.qwen3_moe import QWEN3_MOE
from shared.policies.stablelm import STABLELM

_ALL = (
    BERT, BLOOM, CLIP_TEXT, CLIP_VISION, DISTILBERT, FALCON, GEMMA, GEMMA2, GEMMA3, GPT2, GPT_NEO, GPT_NEOX, GPTJ,
    GRANITE, LLAMA, MEGATRON_MOE, MISTRAL, MIXTRAL, MPT, OLMO2, OPT, PHI, PHI3, QWEN, QWEN2, QWEN2_MOE, QWEN3,
    QWEN3_MOE, ROBERTA, STABLELM,
)  # fmt: skip
POLICIES = {policy.family: policy for policy in _ALL}


def policy_for(config: Config) -> Policy:
    """The policy of a parsed config.json; UnsupportedModelError for a family that has none."""
    model_type = config.get("model_type")
    policy = POLICIES.get(str(model_type))
    if policy is None:
        raise UnsupportedModelError("model_type", f"{model_type!r} is none of {', '.join(sorted(POLICIES))}")
    return policy


def embeds(config: Config) -> bool:
    """Whether a model of this config.json answers vectors; one of a family that is not known answers tokens."""
    policy = POLICIES.get(str(config.get("model_type")))
    return policy is not None and policy.kind == "encoder"


def architecture_of(config: Config) -> Architecture:
    """The architecture record of a parsed config.json; UnsupportedModelError names the field that cannot be served."""
    return policy_for(config).architecture(config)
