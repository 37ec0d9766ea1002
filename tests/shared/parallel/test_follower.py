"""A rank on a device: it maps its pool there before all else, and answers once the device has computed."""

from __future__ import annotations

import json
import queue
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

from shared.batch import BatchEntry
from shared.parallel import follower
from shared.parallel.entries import encode_entries
from shared.parallel.link import Kind, Link
from shared.transport.cuda import COMPUTE
from shared.transport.device_pool import DevicePool, MappedDeviceMemory
from tests.shared.transport.fake_cuda import FakeCuda


def mapped(pool: DevicePool, device: FakeCuda) -> MappedDeviceMemory:
    fd = pool.descriptor()
    assert fd is not None
    return MappedDeviceMemory(device, fd, pool.size, pool.num_bytes)


def test_a_rank_answers_once_its_device_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    leading, device = FakeCuda("GPU-b"), FakeCuda("GPU-b")
    pool = DevicePool(leading, 64)
    pool.settle(pool.mark())
    memory = mapped(pool, device)
    gates: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()

    def compute(entries: list[BatchEntry]) -> None:
        gates.put(device.gate())
        device.run(COMPUTE, lambda: memory.tensor.narrow(0, entries[0].block_table[0], 1).fill_(9) and None)

    engine = SimpleNamespace(
        plan=SimpleNamespace(device="cuda"),
        use_thread=lambda: None,
        warm_up=lambda: compute([BatchEntry([1], 0, [1])]),
        forward=compute,
    )
    monkeypatch.setattr(follower, "_load", lambda link, told: (engine, memory))
    here, there = map(Link, socket.socketpair())
    rank = threading.Thread(target=follower.serve, args=(there,), daemon=True)
    rank.start()
    here.send(Kind.START, json.dumps({}).encode())
    assert here.receive(10) == (Kind.DONE, b"")
    for block, (kind, body) in enumerate(
        [(Kind.WARM_UP, b""), (Kind.FORWARD, encode_entries([BatchEntry([5], 0, [2])]))], 1
    ):
        here.send(kind, body)
        gate = gates.get(timeout=10)
        try:
            with pytest.raises(TimeoutError):
                here.receive(0.2)
            assert pool.tensor[block] == 0
        finally:
            gate.set()
        assert here.receive(10) == (Kind.DONE, b"")
        assert pool.tensor[block] == 9
    here.send(Kind.STOP)
    rank.join(10)
    assert not rank.is_alive()
    here.close()
    there.close()
    device.shut()
    pool.close()
    leading.assert_clean()


def test_a_rank_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    leading = FakeCuda("GPU-b")
    pool = DevicePool(leading, 64)
    pool.settle(pool.mark())
    seen: list[str] = []
    devices: list[FakeCuda] = []

    def driver(ordinal: int) -> FakeCuda:
        seen.append(f"driver {ordinal}")
        devices.append(FakeCuda("GPU-b"))
        return devices[-1]

    monkeypatch.setattr(torch.cuda, "set_device", lambda ordinal: seen.append(f"current {ordinal}"))
    monkeypatch.setattr("shared.transport.cuda.CudaDriver", driver)
    fd = pool.descriptor()
    assert fd is not None
    memory = follower._map(SimpleNamespace(device="cuda", pool_bytes=64), 3, fd, pool.size)  # pyright: ignore[reportArgumentType]
    assert seen == ["current 3", "driver 3"]
    assert memory.tensor.shape == (64,)
    devices[0].shut()
    pool.close()
    leading.assert_clean()
