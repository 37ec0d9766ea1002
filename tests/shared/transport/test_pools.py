"""Workers with a pool for each rank, on either side or both: every head arrives where it belongs, and nothing else."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import grpc
import pytest
import torch
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2
from torch import Tensor

from shared import rpc
from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.parallel.sharding import head_shares
from shared.transport.exporter import Exporter
from shared.transport.importer import Importer
from shared.transport.pool import Pool
from shared.transport.pool_memory import PoolMemory
from shared.transport.routes import Route, routes
from shared.transport.target import HostTarget, target_of
from shared.transport.wire import layout_to_proto

SHARED_MEMORY, INLINE = types_pb2.TRANSPORT_SHARED_MEMORY, types_pb2.TRANSPORT_INLINE
TRANSPORTS = pytest.mark.parametrize("transport", [SHARED_MEMORY, INLINE], ids=["shared_memory", "inline"])
WHOLE = KvLayout("ab" * 32, "bfloat16", num_layers=2, num_kv_heads=6, head_dim=8, block_tokens=4)
NUM_BLOCKS, NUM_TOKENS = 24, 30


def slices(whole: KvLayout, ranks: int) -> list[KvLayout]:
    """As many query heads as it takes for every rank to have one."""
    shares = head_shares(whole.num_kv_heads * max(ranks, 1), whole.num_kv_heads, ranks)
    return [replace(whole, first_kv_head=s.kv_heads.start, num_kv_heads=len(s.kv_heads)) for s in shares]


@dataclass
class Worker:
    pools: list[Pool]

    @classmethod
    def of(cls, layouts: Sequence[KvLayout], stack: AsyncExitStack) -> Worker:
        pools = [Pool(layout, PoolMemory(NUM_BLOCKS * layout.block_bytes)) for layout in layouts]
        for pool in pools:
            stack.callback(pool.close)
            pool.blocks.fill_(0xEE)
        return cls(pools)

    def fill(self) -> None:
        """Every head of the model has numbers of its own, the same in each pool that has it."""
        for pool in self.pools:
            for head in range(pool.layout.num_kv_heads):
                draw = torch.Generator().manual_seed(pool.layout.first_kv_head + head)
                planes = self._planes(pool)[:, :, head]
                planes.copy_(torch.randint(256, planes.shape, dtype=torch.uint8, generator=draw))

    def rows(self, head: int, table: Sequence[int]) -> list[Tensor]:
        """The bytes of a head's elements and scales, token by token, of each pool that has the head."""
        found: list[Tensor] = []
        for pool in self.pools:
            layout = pool.layout
            if layout.first_kv_head <= head < layout.end_kv_head:
                form = layout.format
                parts = [form.elements(pool.blocks)[:, :, :, head - layout.first_kv_head].unflatten(-2, (-1, 1))]
                if (scales := form.scales(pool.blocks)) is not None:
                    parts.append(scales[:, :, :, head - layout.first_kv_head].unsqueeze(-1).unsqueeze(-1))
                # [blocks, layers, 2, block_tokens, 1, elements] -> [tokens, bytes]
                rows = [part[list(table)].movedim(3, 1).flatten(0, 1).flatten(1).contiguous() for part in parts]
                found.append(torch.cat([part.view(torch.uint8) for part in rows], 1))
        return found

    @staticmethod
    def _planes(pool: Pool) -> Tensor:
        """uint8 [blocks, layers * 2, heads, plane_bytes]"""
        form = pool.layout.format
        return pool.blocks.view(NUM_BLOCKS, 2 * form.num_layers, form.num_kv_heads, form.plane_bytes)


async def serve(worker: Worker, stack: AsyncExitStack, tmp_path, **config) -> Exporter:
    server = rpc.create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    transport = TransportConfig(socket_dir=tmp_path, **config)
    exporter = Exporter(worker.pools, worker_id="p", kv_endpoint=endpoint, config=transport)
    await exporter.start()
    kv_pb2_grpc.add_KvServiceServicer_to_server(exporter, server)
    await server.start()
    stack.callback(exporter.close)
    stack.push_async_callback(server.stop, 0)
    return exporter


def importer_of(worker: Worker, stack: AsyncExitStack, transport: int = SHARED_MEMORY, **config) -> Importer:
    disable = [] if transport == SHARED_MEMORY else ["shared_memory"]
    importer = Importer(
        [target_of(pool) for pool in worker.pools],
        worker_id="d",
        config=TransportConfig(disable=disable, **config),
    )
    stack.push_async_callback(importer.close)
    return importer


@TRANSPORTS
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours", "change"),
    [
        (1, 2, {}),
        (2, 1, {}),
        (2, 2, {}),
        (1, 3, {"block_tokens": 8}),
        (3, 2, {"dtype": "int8", "block_tokens": 2}),
        (4, 3, {}),  # uneven: 2, 2, 1, 1 heads to 2, 2, 2
        (12, 2, {}),  # each head in two pools
        (2, 12, {"dtype": "int8"}),
        (12, 12, {}),
    ],
)
async def test_every_head_arrives_once(stack, tmp_path, transport, checksum, theirs, ours, change):
    """change: of both sides' dtype, and of decode's block_tokens."""
    whole = replace(WHOLE, dtype=change.get("dtype", WHOLE.dtype))
    source = Worker.of(slices(whole, theirs), stack)
    target = Worker.of(slices(replace(whole, **change), ours), stack)
    source.fill()
    exporter = await serve(source, stack, tmp_path, checksum=checksum)
    importer = importer_of(target, stack, transport)
    draw = random.Random(theirs * 100 + ours)
    block_tokens = target.pools[0].layout.block_tokens
    from_table = draw.sample(range(1, NUM_BLOCKS), -(-NUM_TOKENS // 4))
    to_table = draw.sample(range(1, NUM_BLOCKS), -(-NUM_TOKENS // block_tokens))
    exporter.open_export("x", from_table)
    # the first block's tokens are held here, as a prefix hit has it
    extents = [
        await exporter.extent("x", from_table[:5], 0, 20),
        await exporter.extent("x", from_table[5:], 20, NUM_TOKENS - 20),
    ]
    num_bytes = 0
    for extent in extents:
        result = await importer.copy(extent, to_table, block_tokens)
        assert result.transport == transport
        num_bytes += result.num_bytes
        await importer.confirm(extent)
    assert num_bytes == len(from_table) * whole.block_bytes, "a head that several pools have comes from one"
    for head in range(whole.num_kv_heads):
        [sent, *_] = source.rows(head, from_table)
        received = target.rows(head, to_table)
        assert len(received) == sum(p.layout.first_kv_head <= head < p.layout.end_kv_head for p in target.pools)
        for rows in received:
            assert torch.equal(rows[block_tokens:NUM_TOKENS], sent[block_tokens:NUM_TOKENS])
            assert (rows[:block_tokens] == 0xEE).all()
    others = [block for block in range(NUM_BLOCKS) if block not in to_table]
    assert all((pool.blocks[others] == 0xEE).all() for pool in target.pools)


@TRANSPORTS
async def test_each_pool_has_a_checksum(stack, tmp_path, transport):
    source, target = (Worker.of(slices(WHOLE, 2), stack) for _ in range(2))
    source.fill()
    exporter, importer = await serve(source, stack, tmp_path, checksum=True), importer_of(target, stack, transport)
    exporter.open_export("x", [7, 3])
    extent = await exporter.extent("x", [7, 3], 0, 8)
    assert not extent.HasField("crc32")
    assert list(extent.pool_crc32) == [zlib.crc32(pool.blocks[[7, 3]].numpy().data) for pool in source.pools]
    await importer.copy(extent, [1, 2])
    source.pools[1].blocks[3, 0] ^= 1
    with pytest.raises(rpc.RpcError, match="checksum") as caught:
        await importer.copy(extent, [1, 2])
    assert caught.value.code.name == "ABORTED"
    del extent.pool_crc32[1:]
    with pytest.raises(rpc.RpcError, match=r"extent\.pool_crc32: .*1 checksums of 2 pools") as caught:
        await importer.copy(extent, [1, 2])
    assert caught.value.code.name == "INVALID_ARGUMENT"


async def test_one_pool_looks_as_ever(stack, tmp_path):
    """What is of several pools is unset, on the wire as in the extents."""
    exporter = await serve(Worker.of([WHOLE], stack), stack, tmp_path, checksum=True)
    channel = await stack.enter_async_context(rpc.connect(exporter._kv_endpoint))
    request = kv_pb2.HandshakeRequest(layout=layout_to_proto(WHOLE), transports=[INLINE])
    response = await kv_pb2_grpc.KvServiceStub(channel).Handshake(request)
    assert (len(response.pools), len(response.handles)) == (0, 1)
    exporter.open_export("x", [1])
    extent = await exporter.extent("x", [1], 0, 4)
    assert extent.HasField("crc32")
    assert not extent.pool_crc32


async def test_several_pools_offer_nothing_to_who_knows_one(stack, tmp_path):
    exporter = await serve(Worker.of(slices(WHOLE, 2), stack), stack, tmp_path)
    channel = await stack.enter_async_context(rpc.connect(exporter._kv_endpoint))
    stub = kv_pb2_grpc.KvServiceStub(channel)
    response = await stub.Handshake(kv_pb2.HandshakeRequest(layout=layout_to_proto(WHOLE), transports=[INLINE]))
    assert not response.handles
    assert response.layout == layout_to_proto(WHOLE)
    assert [pool.layout.num_kv_heads for pool in response.pools] == [3, 3]
    exporter.open_export("x", [1])
    with pytest.raises(grpc.aio.AioRpcError, match="pool: 2 is none of 2") as caught:
        async for _ in stub.Fetch(kv_pb2.FetchRequest(export_id="x", epoch=exporter.epoch, block_ids=[1], pool=2)):
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_transport_is_used_for_all_pools_or_none(stack, tmp_path):
    source, target = (Worker.of(slices(WHOLE, 2), stack) for _ in range(2))
    exporter, importer = await serve(source, stack, tmp_path), importer_of(target, stack)
    first, second = sorted(tmp_path.glob("*.sock"), key=lambda path: len(path.name))
    second.unlink()
    pair = await importer.connect(exporter._kv_endpoint)
    assert pair.transport == INLINE
    assert [second.name in refusal.reason for refusal in pair.refusals] == [True]
    assert first.exists()
    strict = importer_of(target, stack, require="shared_memory")
    with pytest.raises(rpc.RpcError, match=r"transport\.require: shared_memory is required"):
        await strict.connect(exporter._kv_endpoint)


class Liar(kv_pb2_grpc.KvServiceServicer):
    def __init__(self, pools: list[KvLayout]) -> None:
        self.pools = pools

    async def Handshake(self, request, context):
        handles = [kv_pb2.KvHandle(inline=kv_pb2.InlineHandle(chunk_bytes=1))]
        pools = [kv_pb2.KvPool(layout=layout_to_proto(layout), handles=handles) for layout in self.pools]
        return kv_pb2.HandshakeResponse(layout=layout_to_proto(WHOLE), epoch=1, num_blocks=8, pools=pools)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ([{}, {"dtype": "int8"}], r"pools\[1\].dtype"),
        ([{}, {"block_tokens": 8}], r"pools\[1\].block_tokens"),
        ([{}, {"model_digest": "cd" * 32}], r"pools\[1\].model_digest"),
        ([{"num_layers": 3}, {"num_layers": 3}], r"pools.num_layers"),
        ([{}, {"num_kv_heads": 2}], r"pools.num_kv_heads"),
        ([{}, {"num_kv_heads": 0}], r"pools\[1\].num_kv_heads"),
        ([{"num_kv_heads": 2}, {}], r"pools.first_kv_head"),
        ([{"first_kv_head": 1, "num_kv_heads": 2}, {}], r"pools.num_kv_heads"),
        ([{}] * 33, "pools: 66 are more than 64"),
    ],
)
async def test_pools_that_are_none_of_one_worker_are_refused(stack, changes, field):
    layouts = slices(WHOLE, 2)
    pools = [replace(layout, **change) for layout, change in zip(layouts * 33, changes, strict=False)]
    server = rpc.create_server()
    port = server.add_insecure_port("127.0.0.1:0")
    kv_pb2_grpc.add_KvServiceServicer_to_server(Liar(pools if len(changes) == 2 else layouts * 33), server)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    importer = importer_of(Worker.of([WHOLE], stack), stack)
    with pytest.raises(rpc.RpcError, match=field) as caught:
        await importer.connect(f"127.0.0.1:{port}")
    assert caught.value.code.name == "FAILED_PRECONDITION"


async def test_a_field_that_differs_is_named_whatever_the_ranks(stack, tmp_path):
    exporter = await serve(Worker.of(slices(WHOLE, 2), stack), stack, tmp_path)
    for change in ({"head_dim": 16}, {"dtype": "int8"}, {"num_layers": 1}, {"model_digest": "cd" * 32}):
        importer = importer_of(Worker.of(slices(replace(WHOLE, **change), 3), stack), stack)
        with pytest.raises(rpc.RpcError, match=rf"layout\.{next(iter(change))}: "):
            await importer.connect(exporter._kv_endpoint)
    importer = importer_of(Worker.of(slices(replace(WHOLE, num_kv_heads=8), 2), stack), stack)
    with pytest.raises(rpc.RpcError, match=r"layout\.num_kv_heads: .*head 7 is wanted"):
        await importer.connect(exporter._kv_endpoint)
    # a slice of the heads is wanted, and there
    await importer_of(Worker.of(slices(WHOLE, 2)[1:], stack), stack).connect(exporter._kv_endpoint)


def test_pools_have_one_number_of_blocks(stack):
    worker = Worker.of(slices(WHOLE, 2), stack)
    layout = worker.pools[1].layout
    other = Pool(layout, PoolMemory(2 * layout.block_bytes))
    stack.callback(other.close)
    pools = [worker.pools[0], other]
    with pytest.raises(ValueError, match=r"pools of \[24, 2\] blocks"):
        Exporter(pools, worker_id="p", kv_endpoint="h:1", config=TransportConfig())
    with pytest.raises(ValueError, match=r"pools of \[24, 2\] blocks"):
        Importer([target_of(pool) for pool in pools], worker_id="d", config=TransportConfig())
    with pytest.raises(ValueError, match="no whole number of blocks"):
        Pool(replace(WHOLE, num_kv_heads=5), other.memory)


def test_routes_take_each_head_once():
    """All pairs of degrees: each head of each target from one source, in runs that end at the pools' edges alone."""
    for theirs in (1, 2, 3, 4, 5, 6, 12, 18):
        for ours in (1, 2, 3, 4, 5, 6, 12, 18):
            sources, targets = slices(WHOLE, theirs), slices(WHOLE, ours)
            found = routes(sources, targets)
            assert found == sorted(found, key=lambda route: route.source)
            taken: list[tuple[int, int]] = []
            for route in found:
                for head in range(route.num_heads):
                    of_model = sources[route.source].first_kv_head + route.source_head + head
                    assert of_model == targets[route.target].first_kv_head + route.target_head + head
                    assert route.source_head + head < sources[route.source].num_kv_heads
                    taken.append((route.target, route.target_head + head))
            assert sorted(taken) == [
                (i, head) for i, layout in enumerate(targets) for head in range(layout.num_kv_heads)
            ]
            if theirs == ours:
                whole = [(route.source_head, route.target_head, route.num_heads) for route in found]
                assert whole == [(0, 0, layout.num_kv_heads) for layout in targets]


def test_no_route_without_a_source():
    with pytest.raises(ValueError, match="head 3 is in none of the pools"):
        routes(slices(WHOLE, 2)[:1], [WHOLE])
    assert routes([WHOLE], slices(WHOLE, 2)[1:]) == [Route(0, 0, 3, 0, 3)]


async def test_a_slice_of_one_pool_fits_whatever_the_other_heads_are(stack, tmp_path):
    """Heads beside those that move keep what they hold."""
    source = Worker.of([WHOLE], stack)
    source.fill()
    exporter = await serve(source, stack, tmp_path)
    layout = replace(WHOLE, first_kv_head=2, num_kv_heads=3)
    memory = bytearray(b"\xee" * (NUM_BLOCKS * layout.block_bytes))
    importer = Importer([HostTarget(layout, memory)], worker_id="d", config=TransportConfig())
    stack.push_async_callback(importer.close)
    exporter.open_export("x", [5])
    await importer.copy(await exporter.extent("x", [5], 0, 4), [9])
    blocks = torch.frombuffer(memory, dtype=torch.uint8).view(NUM_BLOCKS, -1)
    elements = layout.format.elements(blocks)[9]
    assert torch.equal(
        elements.view(torch.int16), WHOLE.format.elements(source.pools[0].blocks)[5][:, :, 2:5].view(torch.int16)
    )
    assert (blocks[:9] == 0xEE).all()
