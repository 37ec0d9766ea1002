"""A prefill worker's process is killed: SIGKILL, no word of farewell."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict
from tandem.v1 import types_pb2

from shared import rpc
from tests.shared.transport.fake_cuda import FakeCuda

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


# how the pool is reached: by which transport, and on a device by which export
WAYS = {
    "shared_memory": ("shared_memory", None),
    "inline": ("inline", None),
    "cuda_ipc by descriptor": ("cuda_ipc", "descriptor"),
    "cuda_ipc by handle": ("cuda_ipc", "handle"),
}
MAPPED = [way for way in WAYS if way != "inline"]


def device(export: str | None) -> dict[str, FakeCuda]:
    return {"cuda": FakeCuda()} if export else {}


@pytest.mark.parametrize("way", WAYS)
async def test_a_restarted_worker_is_mapped_afresh(start_exporter, importing, layout, held, tmp_path, way):
    transport, export = WAYS[way]
    decode = importing(disable=["shared_memory"] if transport == "inline" else [], **device(export))
    start = held()
    port = free_port()
    first = await start_exporter(1, port=port, export=export)
    await decode.copy(first.extent(layout, [3, 4]), [7, 5])  # gRPC opens what it needs for good
    assert (decode.block(7), decode.block(5)) == (first.block(layout, 3), first.block(layout, 4))
    before = held()
    assert before[1] == start[1] + (way in MAPPED)

    first.kill()
    second = await start_exporter(2, port=port, export=export)
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
    if way in MAPPED:
        assert len(list(tmp_path.glob("*.sock"))) == (2 if export else 1)  # the killed worker's were removed


@pytest.mark.parametrize("way", MAPPED)
async def test_a_dead_workers_memory_is_given_back_without_further_traffic(
    start_exporter, importing, layout, held, way
):
    decode = importing(**device(WAYS[way][1]))
    before = held()[1]
    worker = await start_exporter(1, export=WAYS[way][1])
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


@pytest.mark.parametrize("way", MAPPED)
async def test_the_mapping_outlives_its_owner_while_a_copy_runs(start_exporter, importing, layout, held, occupy, way):
    decode = importing(**device(WAYS[way][1]))
    before = held()[1]
    worker = await start_exporter(1, export=WAYS[way][1])
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


@pytest.mark.parametrize("way", MAPPED)
async def test_descriptors_and_mappings_return_to_the_start(start_exporter, importing, layout, held, way):
    decode = importing(**device(WAYS[way][1]))

    async def life(seed: int) -> None:
        worker = await start_exporter(seed, export=WAYS[way][1])
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


@pytest.mark.parametrize("way", MAPPED)
async def test_a_killed_decode_worker_leaves_nothing_with_prefill(serve, importing, layout, held, way):
    """SIGKILL in the middle of its copies: prefill hears of it from the kernel, and may free the pool at once."""
    export = WAYS[way][1]
    served = await serve(**({"cuda": FakeCuda(), "export": export} if export else {}))
    served.exporter.open_export("x", range(1, 32))
    extent = await served.exporter.extent("x", range(1, 32), 0, 31 * layout.block_tokens)
    before = held()
    options = {
        "layout": asdict(layout),
        "num_blocks": 32,
        "on_device": export is not None,
        "extent": MessageToDict(extent, preserving_proto_field_name=True),
    }
    command = [sys.executable, str(Path(__file__).with_name("importer_process.py")), json.dumps(options)]
    with subprocess.Popen(  # noqa: ASYNC220 - forks and execs at once
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            assert await asyncio.to_thread(process.stdout.readline) == "copied\n"
            assert len(held()[0]) > len(before[0])  # its connections
        finally:
            process.kill()
    await until(lambda: len(held()[0]) <= len(before[0]))
    async with asyncio.timeout(1):
        await served.exporter.release()
    # another one takes its place
    again = await serve(**({"cuda": FakeCuda(), "export": export} if export else {}))
    decode = importing(**device(export))
    again.exporter.open_export("x", [1])
    await decode.copy(await again.exporter.extent("x", [1], 0, layout.block_tokens), [1])
    assert decode.block(1) == again.block(1)
