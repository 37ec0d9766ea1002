"""The modules that the ragged engine of DeepSpeed is made of, for programs that build a model of their own.

Each takes its config (shared/config/modules.py), refuses by name what no op computes, and computes with the ops of
kernels/ over a RaggedBatch and a layer of a cache.
"""

from shared.engine.modules.attention import SelfAttention
from shared.engine.modules.embedding import Embedding
from shared.engine.modules.kv_groups import KvGroups
from shared.engine.modules.linear import Linear
from shared.engine.modules.module import Module
from shared.engine.modules.moe import Moe
from shared.engine.modules.norm import PostNorm, PreNorm
from shared.engine.modules.registry import ConfigBundle, instantiate_config, instantiate_linear, register_module
from shared.engine.modules.unembed import Unembed

__all__ = [
    "ConfigBundle",
    "Embedding",
    "KvGroups",
    "Linear",
    "Module",
    "Moe",
    "PostNorm",
    "PreNorm",
    "SelfAttention",
    "Unembed",
    "instantiate_config",
    "instantiate_linear",
    "register_module",
]
