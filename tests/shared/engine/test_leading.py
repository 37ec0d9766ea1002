"""The leading rank of a worker whose pools lie on devices: which device it waits for before it goes on.

The devices are fakes (fake_cuda.py), which see this process's work alone, as a device does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from shared.batch import BatchEntry
from shared.config import load_config
from shared.engine import EnginePlan
from shared.engine.engine import load_plan
from shared.engine.leading import LeadingEngine
from shared.model_store import ModelStore
from shared.parallel.followers import Followers
from shared.parallel.link import Kind
from shared.parallel.sharding import Shard
from shared.parallel.start import end_group, start_group
from shared.swap_space import SwapSpace
from shared.transport.cuda import COMPUTE
from shared.transport.device_pool import DevicePool
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from tests.shared.transport.fake_cuda import FakeCuda


class Told:
    """Ranks that do at once what they are told."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []

    def tell(self, kind: Kind, body: bytes = b"") -> None:
        self.kinds.append(kind)

    def expect(self, timeout_s: float | None = None) -> None:
        pass


class Scene:
    """A leading rank that computes the whole model in a pool on one device, and has another one beside it."""

    def __init__(self, model: Path, meeting: Path) -> None:
        config = load_config(None, {"model": str(model), "dtype": "float32", "threads": 1, "decode": {"num_blocks": 8}})
        plan = EnginePlan.of(config, config.decode, ModelStore().resolve(config.model), Shard(0, 1))
        self.told, self.devices = Told(), [FakeCuda("GPU-a"), FakeCuda("GPU-b")]
        self.pools = [
            Pool(plan.layout, PoolMemory(plan.pool_bytes), DevicePool(device, plan.pool_bytes))
            for device in self.devices
        ]
        group = start_group(rank=0, size=1, rendezvous=f"file://{meeting}")
        self.engine = LeadingEngine(plan, self.pools, cast(Followers, self.told), weights=load_plan(plan), group=group)

    def close(self) -> None:
        self.engine.close()
        for pool in self.pools:
            pool.close()
        for device in self.devices:
            device.assert_clean()
        end_group()


@pytest.fixture
def scene(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tiny_model("llama"), tmp_path / "meeting")
    yield scene
    scene.close()


def test_a_forward_begins_once_the_other_devices_have_done_what_this_process_told_them(scene: Scene) -> None:
    """A rank's process does not see it: blocks that are swapped in or copied would be read before they are there."""
    other = scene.devices[1]
    gate = other.gate()

    def restore() -> None:
        scene.pools[1].blocks[3].fill_(7)

    other.run(COMPUTE, restore)
    entries = [BatchEntry([5, 6, 7], 0, [3])]
    forward = threading.Thread(target=scene.engine.forward, args=(entries,))
    forward.start()
    try:
        forward.join(0.3)
        assert forward.is_alive()
        assert scene.told.kinds == []
    finally:
        gate.set()
        forward.join(60)
    assert scene.told.kinds == [Kind.FORWARD]
    assert bool((scene.pools[1].blocks[3] == 7).all())


def test_a_mark_is_one_number_on_every_device(scene: Scene) -> None:
    marks = [scene.engine.mark()]
    scene.engine.forward([BatchEntry([5, 6, 7], 0, [3])])
    marks.append(scene.engine.mark())
    assert marks[0] < marks[1]
    for pool in scene.pools:
        assert pool.device is not None
        pool.device.settle(marks[1])
        with pytest.raises(ValueError, match="was never set"):
            pool.device.settle(marks[1] + 1)


def test_blocks_are_copied_and_swapped_on_every_device(scene: Scene) -> None:
    for rank, pool in enumerate(scene.pools):
        pool.blocks[2].fill_(10 + rank)
    scene.engine.copy_blocks([2], [5])
    for rank, pool in enumerate(scene.pools):
        assert bool((pool.blocks[5] == 10 + rank).all())
    swap = SwapSpace(scene.engine.caches[1:], None)
    state = swap.save([5], scene.engine.plan.layout.block_tokens)
    assert state is not None
    swap.restore(state, [6])
    assert bool((scene.pools[1].blocks[6] == 11).all())
    assert not bool(scene.pools[0].blocks[6].any())
