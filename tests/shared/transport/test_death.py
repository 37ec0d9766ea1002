"""A worker's process is killed: SIGKILL, no word of farewell."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from tandem.v1 import types_pb2

from shared import rpc
from tests.shared.transport.cuda_devices import make_cuda

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(condition) -> None:
    """Lets the event loop turn until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


# how the pool is reached: by which transport, and on which device by which export
WAYS = {
    "shared_memory": ("shared_memory", {}),
    "inline": ("inline", {}),
    "cuda_ipc by descriptor": ("cuda_ipc", {"on": "fake", "export": "descriptor"}),
    "cuda_ipc by handle": ("cuda_ipc", {"on": "fake", "export": "handle"}),
    "cuda_ipc by descriptor, on a GPU": ("cuda_ipc", {"on": "gpu", "export": "descriptor"}),
    "cuda_ipc by handle, on a GPU": ("cuda_ipc", {"on": "gpu", "export": "handle"}),
}


def ways(which: Callable[[str], bool], slow: str = "none") -> pytest.MarkDecorator:
    """slow: what the ways begin with that take minutes in all, on a device that is no GPU."""
    marks = {
        way: [pytest.mark.gpu] if "GPU" in way else [pytest.mark.slow] if way.startswith(slow) else [] for way in WAYS
    }
    return pytest.mark.parametrize("way", [pytest.param(way, marks=marks[way]) for way in WAYS if which(way)])


ANY = ways(lambda way: True)
MAPPED = ways(lambda way: way != "inline")
ON_DEVICE = ways(lambda way: way.startswith("cuda_ipc"))


def device(way: str) -> dict[str, Any]:
    """What makes a pool be on the way's device."""
    return {"cuda": make_cuda(WAYS[way][1]["on"])} if WAYS[way][1] else {}


@ANY
async def test_a_restarted_worker_is_mapped_afresh(start_exporter, importing, layout, held, tmp_path, way):
    transport, options = WAYS[way]
    decode = importing(disable=["shared_memory"] if transport == "inline" else [], **device(way))
    start = held()
    port = free_port()
    first = await start_exporter(1, port=port, **options)
    await decode.copy(first.extent(layout, [3, 4]), [7, 5])  # gRPC opens what it needs for good
    assert (decode.block(7), decode.block(5)) == (first.block(layout, 3), first.block(layout, 4))
    before = held()
    assert before[1] == start[1] + (way != "inline")

    first.kill()
    second = await start_exporter(2, port=port, **options)
    assert second.epoch != first.epoch
    result = await decode.copy(second.extent(layout, [3, 4]), [7, 5])
    assert result.transport == types_pb2.Transport.Value(f"TRANSPORT_{transport.upper()}")
    assert (decode.block(7), decode.block(5)) == (second.block(layout, 3), second.block(layout, 4))
    assert [pair.worker_id for pair in decode.importer.pairs()] == ["seed-2"]
    with pytest.raises(rpc.RpcError, match="epoch") as caught:
        await decode.copy(first.extent(layout, [3]), [1])
    assert caught.value.code.name == "ABORTED"
    assert decode.untouched(7, 5)
    await until(lambda: len(held()[0]) <= len(before[0]))
    assert held()[1] == before[1]
    if way != "inline":
        assert len(list(tmp_path.glob("*.sock"))) == (2 if options else 1)  # the killed worker's were removed


@ways(lambda way: way != "inline", slow="cuda_ipc")
async def test_a_dead_workers_memory_is_given_back_without_further_traffic(
    start_exporter, importing, layout, held, way
):
    decode = importing(**device(way))
    before = held()[1]
    worker = await start_exporter(1, **WAYS[way][1])
    pair = await decode.importer.connect(worker.kv_endpoint)
    assert held()[1] == before + 1
    worker.kill()
    await asyncio.wait_for(pair.closed.wait(), 10)
    assert held()[1] == before
    assert decode.importer.pairs() == []
    with pytest.raises(rpc.RpcError) as caught:
        await decode.copy(worker.extent(layout, [1]), [1])
    assert caught.value.code.name == "UNAVAILABLE"
    assert decode.untouched()


@ways(lambda way: way != "inline", slow="cuda_ipc")
async def test_the_mapping_outlives_its_owner_while_a_copy_runs(start_exporter, importing, layout, held, occupy, way):
    decode = importing(**device(way))
    before = held()[1]
    worker = await start_exporter(1, **WAYS[way][1])
    pair = await decode.importer.connect(worker.kv_endpoint)
    gate = occupy(decode.importer)
    copy = asyncio.create_task(decode.copy(worker.extent(layout, list(range(1, 32))), range(1, 32)))
    await asyncio.sleep(0)
    worker.kill()
    await until(lambda: not decode.importer.pairs())
    assert held()[1] == before + 1
    gate.set()
    assert (await copy).num_bytes == 31 * layout.block_bytes
    assert all(decode.block(i) == worker.block(layout, i) for i in range(1, 32))
    await asyncio.wait_for(pair.closed.wait(), 10)
    assert held()[1] == before


async def test_a_worker_killed_during_a_fetch_is_unavailable(start_exporter, importing, layout):
    num_blocks = (64 << 20) // layout.block_bytes
    decode = importing(num_blocks=num_blocks, disable=["shared_memory"])
    worker = await start_exporter(1, num_blocks=num_blocks)
    blocks = list(range(1, num_blocks))
    copy = asyncio.create_task(decode.copy(worker.extent(layout, blocks), blocks))
    await until(lambda: copy.done() or decode.block(1) == worker.block(layout, 1))
    assert not copy.done(), copy.exception()
    worker.process.kill()
    with pytest.raises(rpc.RpcError) as caught:
        await copy
    assert caught.value.code.name == "UNAVAILABLE"
    assert decode.importer.pairs() == []


@ways(lambda way: way != "inline", slow="cuda_ipc")
async def test_descriptors_and_mappings_return_to_the_start(start_exporter, importing, layout, held, way):
    decode = importing(**device(way))

    async def life(seed: int) -> None:
        worker = await start_exporter(seed, **WAYS[way][1])
        pair = await decode.importer.connect(worker.kv_endpoint)
        await decode.copy(worker.extent(layout, [1]), [1])
        worker.kill()
        await asyncio.wait_for(pair.closed.wait(), 10)

    await life(0)  # gRPC and the threads open what they need for good
    start = held()
    for seed in (1, 2, 3):
        await life(seed)
    # gRPC closes the sockets of a channel some time after it says so
    await until(lambda: len(held()[0]) <= len(start[0]))
    assert held()[1] == start[1]


@ON_DEVICE
async def test_a_worker_killed_while_its_device_computes_holds_up_nobody(start_exporter, importing, layout, way):
    """What the copy waits for will never be done."""
    decode = importing(**device(way))
    worker = await start_exporter(1, **WAYS[way][1])
    await decode.copy(worker.extent(layout, [1]), [1])
    late = asyncio.create_task(decode.copy(worker.extent(layout, [2], await worker.compute()), [2]))
    try:
        await asyncio.wait([late], timeout=0.1)
        assert not late.done()
    finally:
        worker.kill()  # it would compute on
    with pytest.raises(rpc.RpcError, match="gone") as caught:
        await asyncio.wait_for(late, 30)
    assert caught.value.code.name == "UNAVAILABLE"
    assert decode.untouched(1)
    other = await start_exporter(2, **WAYS[way][1])
    await decode.copy(other.extent(layout, [3]), [3])
    assert decode.block(3) == other.block(layout, 3)


@asynccontextmanager
async def decoding(layout, way: str, extent) -> AsyncIterator[int]:
    """A decode worker's process, which copies an extent on and on and is killed in the end; the sum of the first."""
    options = {
        "layout": asdict(layout),
        "num_blocks": 32,
        "on": WAYS[way][1].get("on"),
        "extent": MessageToDict(extent, preserving_proto_field_name=True),
    }
    command = [sys.executable, str(Path(__file__).with_name("importer_process.py")), json.dumps(options)]
    with subprocess.Popen(  # noqa: ASYNC220 - forks and execs at once
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            yield int(await asyncio.to_thread(process.stdout.readline))
        finally:
            process.kill()


@MAPPED
async def test_a_killed_decode_worker_leaves_nothing_with_prefill(serve, layout, held, way):
    """In the middle of its copies: prefill hears of it from the kernel, and may free the pool at once."""
    served = await serve(**device(way), **{"export": WAYS[way][1]["export"]} if WAYS[way][1] else {})
    served.exporter.open_export("x", range(1, 32))
    extent = await served.exporter.extent("x", range(1, 32), 0, 31 * layout.block_tokens)
    expected = zlib.crc32(served.pool[layout.block_bytes :])
    before = held()
    for _ in range(2):  # the second takes the first one's place
        async with decoding(layout, way, extent) as copied:
            assert copied == expected
            assert len(held()[0]) > len(before[0])  # its connections
        await until(lambda: len(held()[0]) <= len(before[0]))
    async with asyncio.timeout(1):
        await served.exporter.release()
