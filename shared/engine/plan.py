"""Everything about an engine that is settled before its weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import cast

import torch

from shared.config import ConfigError, DecodeConfig, PrefillConfig, TandemConfig
from shared.kv_cache import KvLayout
from shared.model_files import ModelFiles, read_json
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan, quantizable
from shared.parallel.experts import ExpertPartition, ExpertShard, expert_shard_of
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard
from shared.policies.policy import UnsupportedModelError
from shared.policies.table import policy_for
from shared.pooling import Pooling


@dataclass(frozen=True)
class EnginePlan:
    """Everything that is settled before the weights are read."""

    files: ModelFiles | None  # None: whoever makes the engine has the weights
    architecture: Architecture
    dtype: str  # of weights and activations, a key of DTYPES; keys and values may be kept in another
    layout: KvLayout
    quantization: QuantizationPlan
    device: str
    num_blocks: int  # in memory, the null block included
    max_context: int  # tokens of prompt and output together
    batch_tokens: int  # of a forward at most
    max_running: int  # sequences of a decode step at most
    num_threads: int
    deterministic: bool  # on CUDA: a token's bits are its own, whatever is beside it; on a CPU they always are
    enable_cuda_graph: bool
    eos_token_ids: tuple[int, ...]
    allow_pickle: bool
    pooling: Pooling | None = None  # of a model that embeds; it has no pool but the null block
    shard: Shard | None = None  # of the model, which the layout is of too; None: all of it
    expert_shard: ExpertShard | None = None  # of its experts; None: the shard's share of each, or all of them

    @classmethod
    def of(
        cls,
        config: TandemConfig,
        section: PrefillConfig | DecodeConfig,
        files: ModelFiles,
        shard: Shard | None = None,
        expert_shard: ExpertShard | None = None,
    ) -> EnginePlan:
        """section: of the role. shard: of the rank that this plan is for; all ranks' plans are alike but for it, and
        expert_shard, which is by default the shard's share of each expert.

        Raises ModelError for a model that cannot be served, ConfigError for limits, ValueError naming what of a model
        cannot be cut for so many ranks.
        """
        policy = policy_for(files.config)
        architecture = policy.architecture(files.config)
        if shard is not None:
            shard = replace(shard, splits_inputs=not config.deterministic)
            Partition(architecture, shard)
        if own_experts := expert_shard or expert_shard_of(architecture, shard):
            ExpertPartition(architecture, own_experts)
        pooling = Pooling.load(files.folder) if policy.kind == "encoder" else None
        if pooling is not None:
            _check_embeds(architecture, section)
        ranks = [None] if shard is None else [replace(shard, rank=rank) for rank in range(shard.size)]
        layouts = [
            KvLayout.of(
                architecture,
                files.digest_as(config.weights_form),
                config.kv_dtype_of(section),
                config.block_tokens_of(section),
                rank,
            )
            for rank in ranks
        ]
        layout = layouts[0 if shard is None else shard.rank]
        own = pooling.max_tokens if pooling and pooling.max_tokens else architecture.max_context
        max_context = config.max_context or min(own, architecture.max_context)
        if max_context > architecture.max_context:
            raise ConfigError(f"max_context: {max_context} exceeds the model's own, {architecture.max_context}")
        # a block of the worker is one on each rank
        block_bytes = sum(layout.block_bytes for layout in layouts)
        num_blocks = section.num_blocks or (section.kv_memory_mib << 20) // block_bytes
        if pooling is not None:
            num_blocks = 1
        elif num_blocks < 2:
            raise ConfigError(
                f"kv_memory_mib: a pool of {num_blocks} blocks of {block_bytes} bytes is too small; raise it"
            )
        return cls(
            files=files,
            architecture=architecture,
            dtype=config.weights_dtype,
            layout=layout,
            quantization=_quantization(config, architecture),
            device=_device(config.device),
            num_blocks=num_blocks,
            max_context=max_context,
            batch_tokens=_batch_tokens(section),
            max_running=section.max_running,
            num_threads=max(1, (config.threads or len(os.sched_getaffinity(0))) // len(ranks)),
            deterministic=config.deterministic,
            # prompts are of any length, and a step of theirs is worth its launches
            enable_cuda_graph=config.enable_cuda_graph and isinstance(section, DecodeConfig),
            eos_token_ids=_eos_token_ids(files),
            allow_pickle=config.allow_pickle,
            pooling=pooling,
            shard=shard,
            expert_shard=expert_shard,
        )

    @property
    def model_files(self) -> ModelFiles:
        """Raises ValueError where the plan has none."""
        if self.files is None:
            raise ValueError("this plan names no files: the weights have to be given")
        return self.files

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


def _quantization(config: TandemConfig, architecture: Architecture) -> QuantizationPlan:
    plan = QuantizationPlan.of_mode(config.quantization, config.quantization_exclude)
    if unmatched := plan.unmatched(architecture):
        names = ", ".join(quantizable(architecture))
        raise ConfigError(f"quantization_exclude: no weight is called {', '.join(unmatched)}; there are {names}")
    return plan


def _batch_tokens(section: PrefillConfig | DecodeConfig) -> int:
    """What a role's scheduler computes at once at most."""
    if isinstance(section, DecodeConfig):
        return section.batch_tokens or section.chunk_tokens + section.max_running
    return section.batch_tokens


def _check_embeds(architecture: Architecture, section: PrefillConfig | DecodeConfig) -> None:
    """Raises UnsupportedModelError for an encoder that is not served, ConfigError for a worker that has no work."""
    if architecture.patches or architecture.causal:
        raise UnsupportedModelError("model_type", f"{architecture.family!r} is not served; init_inference takes it")
    if isinstance(section, DecodeConfig):
        raise ConfigError("model: it embeds texts, which prefill workers do alone; start no decode worker for it")


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, and there is no CUDA device; use cpu, or auto")
    return "cuda" if wanted == "cuda" else "cpu"


def _eos_token_ids(files: ModelFiles) -> tuple[int, ...]:
    """generation_config.json's, else config.json's; a chat model has several."""
    path = files.folder / "generation_config.json"
    for values in (read_json(path) if path.is_file() else {}, files.config):
        found = values.get("eos_token_id")
        if found is not None:
            return tuple(cast(list[int], found)) if isinstance(found, list) else (cast(int, found),)
    return ()
