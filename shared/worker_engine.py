"""What a worker computes with, as the configuration says: an engine and its pools, of one rank or of several.

engine, pools, followers = load_engine(config, config.decode)
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from shared.config import ConfigError, DecodeConfig, PrefillConfig, TandemConfig
from shared.engine import EncoderEngine, Engine, EnginePlan
from shared.engine.engine import load_plan
from shared.engine.leading import LeadingEngine
from shared.model_files import ModelFiles
from shared.model_store import ModelStore
from shared.parallel.followers import Followers
from shared.parallel.link import Kind
from shared.parallel.sharding import Shard
from shared.parallel.start import start_group
from shared.transport.cuda import CudaDriver
from shared.transport.device_pool import DevicePool
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """pools: one for each rank, in their order; none of a model that embeds. followers: the other ranks, if any."""

    engine: Engine | EncoderEngine
    pools: list[Pool]
    followers: Followers | None = None


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
    on_cpu = plan.device == "cpu"
    # beside a pool on a device only what cannot be reached there is ever touched
    memory = PoolMemory(plan.pool_bytes, populate=on_cpu)
    device = None
    if not on_cpu:
        driver = CudaDriver(torch.cuda.current_device())
        device = DevicePool(driver, plan.pool_bytes, export=config.transport.cuda_export)
    engine = Engine(plan, device or memory)
    engine.warm_up()
    return Loaded(engine, [Pool(plan.layout, memory, device)])


def _load_ranks(config: TandemConfig, section: PrefillConfig | DecodeConfig, files: ModelFiles) -> Loaded:
    """This process becomes rank 0, and starts the others, which load beside it."""
    plans = _plans(config, section, files)
    pools = [Pool(plan.layout, PoolMemory(plan.pool_bytes, is_sealed=False)) for plan in plans]
    settings = {
        # of what a rank needs to know nothing is secret
        "config": config.model_dump(mode="json", exclude={"gateway", "auth", "up"}),
        "role": "prefill" if isinstance(section, PrefillConfig) else "decode",
    }
    followers = Followers.start(settings, [pool.memory.descriptor for pool in pools[1:]])
    try:
        weights = load_plan(plans[0])
        followers.expect()  # each has mapped its pool: from now on nobody else can
        for pool in pools:
            pool.memory.seal()
        followers.expect()  # and has loaded
        followers.tell(Kind.JOIN)
        group = start_group(rank=0, size=len(plans), rendezvous=followers.rendezvous)
        engine = LeadingEngine(plans[0], pools, followers, weights=weights, group=group)
        engine.warm_up()
    except BaseException:
        followers.stop(orderly=False)
        raise
    return Loaded(engine, pools, followers)


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
    return plans
