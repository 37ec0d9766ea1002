"""What a worker computes with, as the configuration says: an engine and its pools, of one rank or of several.

engine, pools, followers, group = load_engine(config, config.decode)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from shared.config import ConfigError, DecodeConfig, PrefillConfig, TandemConfig
from shared.engine import EncoderEngine, Engine, EnginePlan
from shared.engine.engine import load_plan
from shared.engine.leading import LeadingEngine
from shared.model_files import ModelFiles
from shared.model_store import ModelStore
from shared.parallel.followers import Followers, RankMemory
from shared.parallel.group import Group
from shared.parallel.link import Kind
from shared.parallel.sharding import Shard
from shared.parallel.start import start_group
from shared.transport.cuda import CudaDriver
from shared.transport.device_pool import DevicePool, Export
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """pools: one for each rank, in their order; none of a model that embeds. followers, group: the other ranks, if any,
    and what all of them meet in."""

    engine: Engine | EncoderEngine
    pools: list[Pool]
    followers: Followers | None = None
    group: Group | None = None


def load_engine(config: TandemConfig, section: PrefillConfig | DecodeConfig) -> Loaded:
    """section: of the role. Raises ModelError, ConfigError, and GroupError for a rank that cannot start."""
    files = ModelStore().resolve(config.model, allow_pickle=config.allow_pickle)
    if config.tp_of(section) > 1:
        return _load_ranks(config, section, files)
    plan = EnginePlan.of(config, section, files)
    if plan.pooling is not None:
        encoder = EncoderEngine(plan, plan.pooling)
        encoder.warm_up()
        return Loaded(encoder, [])
    if plan.device == "cpu":
        pool = Pool(plan.layout, PoolMemory(plan.pool_bytes))
    else:
        pool = _pool_on(torch.cuda.current_device(), plan, config.transport.cuda_export)
    engine = Engine(plan, pool.device or pool.memory)
    engine.warm_up()
    return Loaded(engine, [pool])


def _pool_on(ordinal: int, plan: EnginePlan, export: Export) -> Pool:
    """On a device; beside it, only what of it cannot be reached there is ever touched."""
    device = DevicePool(CudaDriver(ordinal), plan.pool_bytes, export=export)
    return Pool(plan.layout, PoolMemory(plan.pool_bytes, populate=False), device)


def _load_ranks(config: TandemConfig, section: PrefillConfig | DecodeConfig, files: ModelFiles) -> Loaded:
    """This process becomes rank 0, and starts the others, which load beside it."""
    plans = _plans(config, section, files)
    device = plans[0].device
    if device == "cpu":
        pools = [Pool(plan.layout, PoolMemory(plan.pool_bytes, is_sealed=False)) for plan in plans]
    else:
        pools = [_pool_on(rank, plan, "descriptor") for rank, plan in enumerate(plans)]
    settings = {
        # of what a rank needs to know nothing is secret
        "config": config.model_dump(mode="json", exclude={"gateway", "auth", "up"}),
        "role": "prefill" if isinstance(section, PrefillConfig) else "decode",
    }
    followers = _start(settings, pools[1:])
    try:
        weights = load_plan(plans[0])
        followers.expect()  # each has mapped its pool: from now on nobody else can
        for pool in pools:
            if pool.device is None:
                pool.memory.seal()
        followers.expect()  # and has loaded
        followers.tell(Kind.JOIN)
        group = start_group(rank=0, size=len(plans), rendezvous=followers.rendezvous, device=device)
        engine = LeadingEngine(plans[0], pools, followers, weights=weights, group=group)
        engine.warm_up()
    except BaseException:
        followers.stop(orderly=False)
        raise
    return Loaded(engine, pools, followers, group)


def _start(settings: Mapping[str, Any], pools: Sequence[Pool]) -> Followers:
    """The ranks of these pools, each with what it maps its own by."""
    with ExitStack() as opened:
        memories: list[RankMemory] = []
        for pool in pools:
            if pool.device is None:
                memories.append(RankMemory(pool.memory.descriptor, pool.memory.num_bytes))
            else:
                descriptor = pool.device.descriptor()
                assert descriptor is not None
                opened.callback(os.close, descriptor)
                memories.append(RankMemory(descriptor, pool.device.size))
        return Followers.start(settings, memories)


def _plans(config: TandemConfig, section: PrefillConfig | DecodeConfig, files: ModelFiles) -> list[EnginePlan]:
    """Of every rank. Raises ConfigError naming the setting that asks for ranks that cannot be."""
    size = config.tp_of(section)
    role = "prefill" if isinstance(section, PrefillConfig) else "decode"
    field = "tp" if section.tp is None else f"{role}.tp"
    try:
        plans = [EnginePlan.of(config, section, files, Shard(rank, size)) for rank in range(size)]
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None
    if plans[0].pooling is not None:
        raise ConfigError(f"{field}: {size}, and a model that embeds texts is computed by one process; use 1")
    if plans[0].device == "cuda" and (count := torch.cuda.device_count()) < size:
        raise ConfigError(
            f"{field}: {size}, and CUDA shows {count} devices: a rank has one of its own; let CUDA_VISIBLE_DEVICES "
            f"name {size}, or use {count}"
        )
    return plans
