"""Workers of several ranks on devices: a pool on each, and what processes and devices do in which order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tandem.v1 import types_pb2

from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.transport.cuda import COMPUTE, CudaError
from shared.transport.device_pool import DevicePool, Export, MappedDeviceMemory
from shared.transport.exporter import Exporter
from shared.transport.importer import Importer
from shared.transport.pool import Pool, mark, settle
from shared.transport.pool_memory import PoolMemory
from shared.transport.target import target_of
from tests.shared.transport.fake_cuda import FakeCuda
from tests.shared.transport.test_pools import NUM_BLOCKS, WHOLE, Worker, serve, slices

CUDA_IPC, SHARED_MEMORY, INLINE = (
    types_pb2.TRANSPORT_CUDA_IPC,
    types_pb2.TRANSPORT_SHARED_MEMORY,
    types_pb2.TRANSPORT_INLINE,
)
NAMES = ("GPU-a", "GPU-b", "GPU-c")


def devices(first: int, count: int) -> list[FakeCuda]:
    """Of one process, each of which reads all others' memory."""
    return [FakeCuda(NAMES[first + i], peers=NAMES) for i in range(count)]


def on_devices(
    layouts: Sequence[KvLayout], cudas: Sequence[FakeCuda], stack: AsyncExitStack, *, export: Export = "descriptor"
) -> Worker:
    """A pool on each device, filled with 0xEE."""
    pools: list[Pool] = []
    for layout, cuda in zip(layouts, cudas, strict=True):
        num_bytes = NUM_BLOCKS * layout.block_bytes
        stack.callback(cuda.assert_clean)
        device = DevicePool(cuda, num_bytes, export=export)
        pools.append(Pool(layout, PoolMemory(num_bytes, populate=False), device))
        stack.callback(pools[-1].close)
    settle(pools, mark(pools))
    for pool in pools:
        pool.blocks.fill_(0xEE)
    return Worker(pools)


async def served(worker: Worker, stack: AsyncExitStack, tmp_path, **config) -> Exporter:
    exporter = await serve(worker, stack, tmp_path, **config)
    stack.push_async_callback(exporter.release)
    return exporter


def importing(worker: Worker, stack: AsyncExitStack, **config) -> Importer:
    targets = [target_of(pool) for pool in worker.pools]
    for target in targets:
        stack.callback(target.close)
    importer = Importer(targets, worker_id="d", config=TransportConfig(**config))
    stack.push_async_callback(importer.close)
    return importer


def arrived(source: Worker, target: Worker, from_table: list[int], to_table: list[int]) -> bool:
    """Whether every head's rows are in every pool that has the head, and no other block was touched."""
    others = [block for block in range(NUM_BLOCKS) if block not in to_table]
    return all(
        torch.equal(rows, source.rows(head, from_table)[0])
        for head in range(WHOLE.num_kv_heads)
        for rows in target.rows(head, to_table)
    ) and all((pool.blocks[others] == 0xEE).all() for pool in target.pools)


async def turn(times: int = 200) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("export", ["descriptor", "handle"])
@pytest.mark.parametrize(("theirs", "ours"), [(1, 2), (2, 1), (2, 2), (3, 2)])
async def test_every_head_arrives_from_device_to_device(stack, tmp_path, theirs, ours, export, checksum):
    source = on_devices(slices(WHOLE, theirs), devices(0, theirs), stack, export=export)
    readers = devices(1, ours)
    target = on_devices(slices(WHOLE, ours), readers, stack)
    source.fill()
    exporter, importer = await served(source, stack, tmp_path, checksum=checksum), importing(target, stack)
    pair = await importer.connect(exporter._kv_endpoint)
    assert (pair.transport, pair.refusals) == (CUDA_IPC, ())
    # each device has mapped the pools that it reads, once
    for number, reader in enumerate(readers):
        assert len(reader.opened) == len({route.source for route in pair.routes if route.target == number})
    exporter.open_export("x", [5, 2, 9])
    extent = await exporter.extent("x", [5, 2, 9], 0, 12)
    assert (await importer.copy(extent, [1, 8, 4])).transport == CUDA_IPC
    await importer.confirm(extent)
    assert arrived(source, target, [5, 2, 9], [1, 8, 4])


async def test_all_pools_go_another_way_if_one_device_does_not_reach_one(stack, tmp_path):
    source = on_devices(slices(WHOLE, 2), devices(0, 2), stack)
    readers = [FakeCuda("GPU-b", peers=NAMES), FakeCuda("GPU-c", peers=["GPU-a"], visible=NAMES)]
    target = on_devices(slices(WHOLE, 3), [*readers, FakeCuda("GPU-a", peers=NAMES)], stack)
    source.fill()
    exporter, importer = await served(source, stack, tmp_path), importing(target, stack)
    pair = await importer.connect(exporter._kv_endpoint)
    assert pair.transport == SHARED_MEMORY
    assert [refusal.reason for refusal in pair.refusals] == ["GPU-c has no peer access to GPU-b"]
    exporter.open_export("x", [5])
    await importer.copy(await exporter.extent("x", [5], 0, 4), [1])
    assert arrived(source, target, [5], [1])


@pytest.mark.parametrize("disable", [["cuda_ipc"], ["cuda_ipc", "shared_memory"]])
@pytest.mark.parametrize("on_device", [True, False])
async def test_blocks_of_every_pool_wait_for_their_mark_and_pass_through_the_host(stack, tmp_path, disable, on_device):
    """One number is the mark of each pool."""
    cudas = devices(0, 2)
    source = on_devices(slices(WHOLE, 2), cudas, stack)
    target = on_devices([WHOLE], devices(2, 1), stack) if on_device else Worker.of([WHOLE], stack)
    exporter, importer = await served(source, stack, tmp_path), importing(target, stack, disable=disable)
    exporter.open_export("x", [5])
    pair = await importer.connect(exporter._kv_endpoint)
    assert pair.transport == (INLINE if len(disable) == 2 else SHARED_MEMORY)
    gates = [cuda.gate() for cuda in cudas]
    for cuda in cudas:
        cuda.run(COMPUTE, source.fill)
    copy = asyncio.create_task(importer.copy(await exporter.extent("x", [5], 0, 4, mark(source.pools)), [1]))
    for gate in gates:
        await turn()
        assert not copy.done()
        gate.set()
    await copy
    assert arrived(source, target, [5], [1])


async def test_a_copy_waits_for_the_mark_of_every_device_of_either_worker(stack, tmp_path):
    theirs, ours = devices(0, 2), devices(1, 2)
    source, target = on_devices(slices(WHOLE, 2), theirs, stack), on_devices(slices(WHOLE, 2), ours, stack)
    exporter, importer = await served(source, stack, tmp_path), importing(target, stack)
    await importer.connect(exporter._kv_endpoint)
    exporter.open_export("x", [5])
    gates = [cuda.gate() for cuda in (*theirs, *ours)]
    for cuda in theirs:
        cuda.run(COMPUTE, source.fill)
    extent = await exporter.extent("x", [5], 0, 4, mark(source.pools))
    copy = asyncio.create_task(importer.copy(extent, [1], mark=mark(target.pools)))
    for gate in gates:
        await turn()
        assert not copy.done()
        gate.set()
    await copy
    assert arrived(source, target, [5], [1])


def test_marks_are_of_all_pools_and_none_of_those_in_host_memory():
    layouts = slices(WHOLE, 2)
    on_host = [Pool(layout, PoolMemory(layout.block_bytes)) for layout in layouts]
    assert mark(on_host) == 0
    settle(on_host, 0)
    cudas = devices(0, 2)
    pools = [
        Pool(layout, PoolMemory(layout.block_bytes), DevicePool(cuda, layout.block_bytes))
        for layout, cuda in zip(layouts, cudas, strict=True)
    ]
    assert [mark(pools) for _ in range(40)] == list(range(1, 41))
    with pytest.raises(ValueError, match="mark 41 was never set"):
        settle(pools, 41)
    for pool in (*on_host, *pools):
        pool.close()
    for cuda in cudas:
        cuda.assert_clean()


def mapped(pool: DevicePool, cuda: FakeCuda) -> MappedDeviceMemory:
    fd = pool.descriptor()
    assert fd is not None
    return MappedDeviceMemory(cuda, fd, pool.size, pool.num_bytes)


def test_a_rank_writes_a_pool_that_another_process_made():
    layout = replace(WHOLE, num_kv_heads=1)
    leading, rank = FakeCuda("GPU-b"), FakeCuda("GPU-b")
    pool = DevicePool(leading, 3 * layout.block_bytes)
    settle([Pool(layout, PoolMemory(pool.num_bytes), pool)], pool.mark())
    memory = mapped(pool, rank)
    files = len(os.listdir("/proc/self/fd"))
    assert memory.tensor.shape == pool.tensor.shape
    assert (memory.tensor == 0).all()
    memory.tensor[layout.block_bytes] = 7
    assert pool.tensor.nonzero().tolist() == [[layout.block_bytes]]
    assert memory.mark() == 0
    small = pool.descriptor()
    assert small is not None
    with pytest.raises(OSError, match=rf"the pool's memory has {pool.size} bytes, not {pool.size + 1}"):
        MappedDeviceMemory(FakeCuda("GPU-b"), small, pool.size, pool.size + 1)
    stranger = pool.descriptor()
    assert stranger is not None
    with pytest.raises(CudaError, match="GPU-b is not visible here"):
        MappedDeviceMemory(FakeCuda("GPU-a"), stranger, pool.size, pool.num_bytes)
    assert len(os.listdir("/proc/self/fd")) == files, "a descriptor is taken over, whatever comes of it"
    rank.shut()
    pool.close()
    leading.assert_clean()


def test_what_is_mapped_to_be_read_cannot_be_written():
    """So a test in which a reader writes ends at once."""
    owner, reader, writer = FakeCuda("GPU-b"), FakeCuda("GPU-b"), FakeCuda("GPU-b")
    pool = DevicePool(owner, 4096)
    fd = pool.descriptor()
    assert fd is not None
    assert [access(cuda.map_descriptor(fd, pool.size, writes=cuda is writer)) for cuda in (reader, writer)] == [
        "r--s",
        "rw-s",
    ]
    os.close(fd)
    reader.shut()
    writer.shut()
    pool.close()
    owner.assert_clean()


def access(address: int) -> str:
    """What this process may do where it has mapped memory."""
    [line] = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{address:x}-")]
    return line.split()[1]


def test_a_rank_has_settled_once_its_device_has_computed():
    layout = replace(WHOLE, num_kv_heads=1)
    leading, rank = FakeCuda("GPU-b"), FakeCuda("GPU-b")
    pool = DevicePool(leading, layout.block_bytes)
    pool.settle(pool.mark())
    memory = mapped(pool, rank)
    gate = rank.gate()

    def forward() -> None:
        memory.tensor.fill_(9)

    rank.run(COMPUTE, forward)
    pool.settle(pool.mark())  # this process's own queue is another
    assert (pool.tensor == 0).all()
    gate.set()
    memory.settle()
    assert (pool.tensor == 9).all()
    rank.shut()
    pool.close()
    leading.assert_clean()
