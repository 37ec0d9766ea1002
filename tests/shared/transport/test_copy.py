"""Blocks copied between two workers' pools, over both transports."""

import asyncio
import random
import zlib

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared import rpc
from shared.config import TransportConfig
from shared.kv_cache import KvCache, KvLayout
from shared.transport.exporter import Exporter
from shared.transport.importer import Importer
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from shared.transport.target import HostTarget
from shared.transport.wire import CHUNK_BYTES

SHARED_MEMORY, INLINE = types_pb2.TRANSPORT_SHARED_MEMORY, types_pb2.TRANSPORT_INLINE
TRANSPORTS = pytest.mark.parametrize("transport", [SHARED_MEMORY, INLINE], ids=["shared_memory", "inline"])


def disable(transport: int) -> dict[str, list[str]]:
    return {"disable": [] if transport == SHARED_MEMORY else ["shared_memory"]}


@TRANSPORTS
@pytest.mark.parametrize("checksum", [False, True])
async def test_copies_exactly_the_blocks_of_the_extent(serve, importing, layout, transport, checksum):
    served, decode = await serve(checksum=checksum), importing(**disable(transport))
    source, destination = [4, 5, 6, 30, 2], [9, 10, 20, 21, 1]
    served.exporter.open_export("r/1", source[:3])
    served.exporter.extend("r/1", source[3:])
    extent = await served.exporter.extent("r/1", source, 32, 5 * 16 - 3)
    assert extent.HasField("crc32") == checksum
    result = await decode.copy(extent, destination)
    assert (result.num_bytes, result.transport) == (5 * layout.block_bytes, transport)
    assert result.seconds > 0
    assert [decode.block(d) for d in destination] == [served.block(s) for s in source]
    assert decode.untouched(*destination)


@TRANSPORTS
async def test_carries_a_cache_of_real_tensors(stack, transport):
    """Blocks of several chunks each, from one KvCache to another, both over memory files."""
    layout = KvLayout("ab" * 32, "bfloat16", num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=16)
    assert layout.block_bytes % CHUNK_BYTES
    memories = [PoolMemory(16 * layout.block_bytes, populate=False) for _ in range(2)]
    source, target = [KvCache(layout, 16, memory=memory.tensor) for memory in memories]
    source.pool.random_(generator=torch.Generator().manual_seed(0))
    server = rpc.create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    exporter = Exporter([Pool(layout, memories[0])], worker_id="p", kv_endpoint=endpoint, config=TransportConfig())
    await exporter.start()
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    await server.start()
    importer = Importer(
        [HostTarget(layout, memories[1].buffer)],
        worker_id="d",
        config=TransportConfig(**disable(transport), checksum=True),
    )
    exporter.open_export("x", [7, 8, 9, 10, 3])
    result = await importer.copy(await exporter.extent("x", [7, 8, 9, 10, 3], 0, 80), [1, 2, 3, 5, 4])
    assert result.transport == transport
    assert torch.equal(target.pool[[1, 2, 3, 5, 4]], source.pool[[7, 8, 9, 10, 3]])
    assert not target.pool[0].any()
    assert not target.pool[6:].any()
    await importer.close()
    exporter.close()
    await server.stop(0)
    for memory in memories:
        memory.close()


@TRANSPORTS
async def test_concurrent_copies_do_not_mix(serve, importing, transport):
    served, decode = await serve(num_blocks=65), importing(num_blocks=65, **disable(transport))
    served.exporter.open_export("x", range(1, 65))
    pairs = list(zip(random.Random(1).sample(range(1, 65), 64), random.Random(2).sample(range(1, 65), 64), strict=True))

    async def copy(part: list[tuple[int, int]]) -> None:
        source, destination = zip(*part, strict=True)
        await decode.copy(await served.exporter.extent("x", source, 0, 16 * len(part)), destination)

    await asyncio.gather(*(copy(pairs[i : i + 4]) for i in range(0, 64, 4)))
    assert all(decode.block(d) == served.block(s) for s, d in pairs)


@TRANSPORTS
async def test_a_wrong_checksum_is_aborted(serve, importing, transport):
    served, decode = await serve(checksum=True), importing(**disable(transport))
    served.exporter.open_export("x", [1, 2])
    extent = await served.exporter.extent("x", [2, 1], 0, 32)
    assert extent.crc32 == zlib.crc32(served.block(2) + served.block(1))
    served.memory.buffer[served.layout.block_bytes] ^= 1
    with pytest.raises(rpc.RpcError, match="checksum") as caught:
        await decode.copy(extent, [3, 4])
    assert caught.value.code.name == "ABORTED"


@TRANSPORTS
async def test_a_stale_epoch_is_aborted(serve, importing, transport):
    served, decode = await serve(), importing(**disable(transport))
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)
    extent.epoch += 1
    with pytest.raises(rpc.RpcError, match="epoch") as caught:
        await decode.copy(extent, [1])
    assert caught.value.code.name == "ABORTED"
    assert decode.untouched()


BAD_EXTENTS = {
    "layout": ({"layout_digest": "00"}, "FAILED_PRECONDITION", "extent.layout_digest"),
    "endpoint": ({"kv_endpoint": "unix:/x"}, "INVALID_ARGUMENT", "kv_endpoint"),
    "null block": ({"block_ids": [0, 2]}, "INVALID_ARGUMENT", "extent.block_ids"),
    "beyond the pool": ({"block_ids": [1, 32]}, "INVALID_ARGUMENT", "extent.block_ids"),
    "far beyond": ({"block_ids": [1, 2**32 - 1]}, "INVALID_ARGUMENT", "extent.block_ids"),
    "twice": ({"block_ids": [2, 2]}, "INVALID_ARGUMENT", "extent.block_ids"),
    "too many tokens": ({"num_tokens": 33}, "INVALID_ARGUMENT", "extent.num_tokens"),
    "too few tokens": ({"num_tokens": 16}, "INVALID_ARGUMENT", "extent.num_tokens"),
    "no tokens": ({"num_tokens": 0}, "INVALID_ARGUMENT", "extent.num_tokens"),
    "within a block": ({"first_token": 8}, "INVALID_ARGUMENT", "extent.first_token"),
}


@TRANSPORTS
@pytest.mark.parametrize("case", BAD_EXTENTS)
async def test_refuses_an_extent_that_cannot_be(serve, importing, transport, case):
    change, code, field = BAD_EXTENTS[case]
    served, decode = await serve(), importing(**disable(transport))
    served.exporter.open_export("x", range(1, 32))
    extent = await served.exporter.extent("x", [1, 2], 16, 32)
    for name in change:
        extent.ClearField(name)
    extent.MergeFrom(kv_pb2.KvExtent(**change))
    with pytest.raises(rpc.RpcError, match=f"{code}: {field}"):
        await decode.copy(extent, [1, 2])
    assert decode.untouched()


@pytest.mark.parametrize("destination", [[1], [0, 1], [1, 32], [-1, 1], [3, 3]])
async def test_refuses_a_wrong_destination(serve, importing, destination):
    served, decode = await serve(), importing()
    served.exporter.open_export("x", [1, 2])
    with pytest.raises(ValueError, match=r"do not go|not different blocks"):
        await decode.copy(await served.exporter.extent("x", [1, 2], 0, 32), destination)
    assert decode.untouched()


async def test_the_exporter_refuses_its_own_callers_mistakes(serve):
    exporter = (await serve()).exporter
    exporter.open_export("x", [1, 2])
    for mistake in (
        lambda: exporter.open_export("x"),
        lambda: exporter.extend("y", [1]),
        lambda: exporter.extend("x", [0]),
        lambda: exporter.extend("x", [32]),
    ):
        with pytest.raises(ValueError, match=r"export|not all in"):
            mistake()
    for arguments in (("x", [3], 0, 16), ("y", [1], 0, 16), ("x", [1], 0, 17), ("x", [1], 1, 16)):
        with pytest.raises(ValueError, match=r"export|tokens"):
            await exporter.extent(*arguments)
    assert exporter.num_exports == 1
    exporter.close_export("x")
    exporter.close_export("x")
    assert exporter.num_exports == 0


async def test_fetch_reads_live_exports_only(serve, stack):
    served = await serve()
    epoch = served.exporter.epoch
    served.exporter.open_export("x", [1, 2, 3])
    stub = kv_pb2_grpc.KvServiceStub(await stack.enter_async_context(rpc.connect(served.kv_endpoint)))

    async def fetch(export_id: str, blocks: list[int], epoch: int = epoch) -> bytes | str:
        try:
            request = kv_pb2.FetchRequest(export_id=export_id, epoch=epoch, block_ids=blocks)
            return b"".join([response.data async for response in stub.Fetch(request)])
        except grpc.aio.AioRpcError as error:
            return error.code().name

    assert await fetch("x", [3, 1]) == served.block(3) + served.block(1)
    assert await fetch("x", [4]) == "INVALID_ARGUMENT"
    assert await fetch("x", [0]) == "INVALID_ARGUMENT"
    assert await fetch("x", []) == b""
    assert await fetch("x", [1, 1]) == "INVALID_ARGUMENT"
    assert await fetch("x", [2**32 - 1]) == "INVALID_ARGUMENT"
    assert await fetch("y", [1]) == "ABORTED"
    assert await fetch("x", [1], epoch ^ 1) == "ABORTED"
    served.exporter.close_export("x")
    assert await fetch("x", [1]) == await fetch("x", []) == "ABORTED"


async def test_no_byte_leaves_once_the_export_has_ended(serve, stack, layout):
    """In the middle of a Fetch: the blocks may hold another request's tokens by then."""
    blocks = range(1, 1 + 40 * CHUNK_BYTES // layout.block_bytes)
    served = await serve(num_blocks=len(blocks) + 1)
    served.exporter.open_export("x", blocks)
    stub = kv_pb2_grpc.KvServiceStub(await stack.enter_async_context(rpc.connect(served.kv_endpoint)))
    request = kv_pb2.FetchRequest(export_id="x", epoch=served.exporter.epoch, block_ids=blocks)
    call = stub.Fetch(request)
    before = served.memory.buffer.tobytes()[layout.block_bytes :]
    received = bytearray((await call.read()).data)
    assert len(received) == CHUNK_BYTES
    served.exporter.close_export("x")
    served.memory.buffer[:] = b"\xff" * served.memory.num_bytes
    served.exporter.open_export("x", blocks)  # a namesake is another export

    async def read_on() -> None:
        while chunk := await call.read():
            received.extend(chunk.data)

    with pytest.raises(grpc.aio.AioRpcError, match="has ended") as caught:
        await read_on()
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert len(received) < 40 * CHUNK_BYTES
    assert received == before[: len(received)]


class Stretcher(kv_pb2_grpc.KvServiceServicer):
    """Serves an exporter's handshake, and a Fetch of another length than asked for."""

    def __init__(self, exporter: Exporter, chunks: list[int]) -> None:
        self.exporter, self.chunks = exporter, chunks

    async def Handshake(self, request, context):
        return await self.exporter.Handshake(request, context)

    async def Fetch(self, request, context):
        for size in self.chunks:
            yield kv_pb2.FetchResponse(data=bytes(size))


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [([], "less"), ([100], "less"), ([2048, 1], "more"), ([1 << 21], "more"), ([2048 + 1], "more"), ([0, 2048], None)],
)
async def test_checks_how_many_bytes_come(serve, importing, stack, layout, chunks, expected):
    assert layout.block_bytes == 2048
    served, decode = await serve(), importing(disable=["shared_memory"])
    server = rpc.create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    kv_pb2_grpc.add_KvServiceServicer_to_server(Stretcher(served.exporter, chunks), server)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)
    extent.kv_endpoint = endpoint
    if expected:
        with pytest.raises(rpc.RpcError, match=expected):
            await decode.copy(extent, [5])
    else:
        await decode.copy(extent, [5])
        assert decode.block(5) == bytes(2048)
    assert decode.untouched(5)


@TRANSPORTS
async def test_no_extent_from_the_wire_does_harm(serve, importing, layout, transport):
    """Any extent at all gives the right bytes in the right place, or a status that is no bug's."""
    served, decode = await serve(num_blocks=8), importing(num_blocks=8, **disable(transport))
    served.exporter.open_export("x", [1, 2, 3, 4, 5])
    valid = await served.exporter.extent("x", [1, 2], 16, 32)
    block_ids = st.lists(st.one_of(st.integers(0, 8), st.integers(0, 2**32 - 1)), max_size=7)
    extents = st.builds(
        kv_pb2.KvExtent,
        kv_endpoint=st.one_of(st.just(valid.kv_endpoint), st.sampled_from(["", "127.0.0.1:1", "unix:/x"])),
        epoch=st.one_of(st.just(valid.epoch), st.integers(0, 2**64 - 1)),
        layout_digest=st.one_of(st.just(valid.layout_digest), st.text(max_size=5)),
        block_ids=block_ids,
        first_token=st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
        num_tokens=st.one_of(st.integers(0, 120), st.integers(0, 2**32 - 1)),
        crc32=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
        export_id=st.one_of(st.just("x"), st.text(max_size=5)),
    )
    drawn: list[kv_pb2.KvExtent] = []

    @settings(max_examples=60, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(extents, st.booleans())
    def draw(extent: kv_pb2.KvExtent, fit: bool) -> None:
        if fit:  # half of them agree in their numbers, so that they come further
            extent.num_tokens = 16 * len(extent.block_ids)
            extent.first_token = extent.first_token // 16 * 16
        drawn.append(extent)

    draw()
    codes = set()
    for extent in drawn:
        destination = list(range(1, 8))[: len(extent.block_ids)]
        before = decode.pool[:]
        try:
            await decode.copy(extent, destination)
            assert [decode.block(d) for d in destination] == [served.block(s) for s in extent.block_ids]
        except rpc.RpcError as error:
            codes.add(error.code.name)
        assert decode.block(0) == b"\xee" * layout.block_bytes
        end = (len(destination) + 1) * layout.block_bytes
        assert decode.pool[end:] == before[end:]
    assert "INVALID_ARGUMENT" in codes
    assert codes <= {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "ABORTED", "UNAVAILABLE"}
