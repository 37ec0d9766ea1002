"""What a worker of several ranks on devices asks for before a weight is read, and what it hands its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import worker_engine
from shared.config import ConfigError, load_config
from shared.kv_cache import KvLayout
from shared.parallel.followers import Followers, RankMemory
from shared.transport.device_pool import DevicePool
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from tests.shared.transport.fake_cuda import FakeCuda

LAYOUT = KvLayout("ab" * 32, "float32", num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4)


@pytest.mark.parametrize(("overrides", "field"), [({"tp": 2}, "tp"), ({"decode": {"tp": 2}}, r"decode\.tp")])
def test_fewer_devices_than_ranks_are_refused(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(worker_engine, "load_plan", lambda plan: pytest.fail("weights are read"))
    config = load_config(overrides={"model": str(tiny_model("llama")), "device": "cuda", **overrides})
    with pytest.raises(ConfigError, match=rf"^{field}: 2, and CUDA shows 1 devices: .*CUDA_VISIBLE_DEVICES name 2"):
        worker_engine.load_engine(config, config.decode)


@pytest.mark.parametrize("on_device", [True, False])
def test_each_rank_gets_the_memory_of_its_pool(monkeypatch: pytest.MonkeyPatch, on_device: bool) -> None:
    """A descriptor of a device's memory is of no use here once the rank has it."""
    device = FakeCuda("GPU-b")
    pools = [
        Pool(
            LAYOUT,
            PoolMemory(count * LAYOUT.block_bytes, is_sealed=False),
            DevicePool(device, count * LAYOUT.block_bytes) if on_device else None,
        )
        for count in (2, 3)
    ]
    seen: list[RankMemory] = []
    sizes: list[int] = []

    def start(settings: Mapping[str, Any], memories: Sequence[RankMemory]) -> str:
        seen.extend(memories)
        sizes.extend(os.fstat(memory.descriptor).st_size for memory in memories)
        return f"ranks of {settings['role']}"

    monkeypatch.setattr(Followers, "start", start)
    assert worker_engine._start({"role": "decode"}, pools) == "ranks of decode"
    assert [memory.num_bytes for memory in seen] == sizes
    for memory, pool in zip(seen, pools, strict=True):
        if pool.device is None:
            assert memory == (pool.memory.descriptor, pool.memory.num_bytes)
        else:
            assert memory.num_bytes == pool.device.size
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(memory.descriptor)
        pool.close()
    device.assert_clean()
