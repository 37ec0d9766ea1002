"""After a cancelled copy has raised, nothing writes any more: its blocks may have another owner (SGLang #35049)."""

import asyncio
import threading

import pytest
from tandem.v1 import kv_pb2, kv_pb2_grpc

from shared import rpc
from shared.transport import block_copy, importer
from shared.transport.importer import COPY_THREADS
from shared.transport.wire import CHUNK_BYTES


async def turn(times: int = 50) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def drain(importer) -> None:
    """Returns when all that was handed to an importer's threads before is done."""
    await asyncio.gather(*(asyncio.wrap_future(importer._threads.submit(int)) for _ in range(COPY_THREADS)))


async def test_a_delayed_copy_is_awaited_and_writes_nothing(serve, importing, occupy):
    served, decode = await serve(), importing()
    served.exporter.open_export("x", range(1, 32))
    await decode.importer.connect(served.kv_endpoint)
    gate = occupy(decode.importer)
    copy = asyncio.create_task(decode.copy(await served.exporter.extent("x", range(1, 32), 0, 31 * 16), range(1, 32)))
    await turn()
    for _ in range(3):  # however often the caller insists
        copy.cancel()
        await turn()
        assert not copy.done(), "the caller may free its blocks while a copy is still to come"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert decode.untouched()
    await drain(decode.importer)
    assert decode.untouched()


async def test_a_copy_cancelled_midway_ends_before_it_raises(serve, importing, monkeypatch):
    monkeypatch.setattr(block_copy, "PIECE_BYTES", 64)
    begun, go_on = threading.Event(), threading.Event()
    real, written_late = block_copy.ctypes.memmove, []
    raised = False

    def memmove(*arguments):
        begun.set()
        go_on.wait()
        written_late.append(raised)
        return real(*arguments)

    served, decode = await serve(), importing()
    served.exporter.open_export("x", range(1, 32))
    await decode.importer.connect(served.kv_endpoint)
    monkeypatch.setattr(block_copy.ctypes, "memmove", memmove)
    copy = asyncio.create_task(decode.copy(await served.exporter.extent("x", range(1, 32), 0, 31 * 16), range(1, 32)))
    await asyncio.to_thread(begun.wait)
    copy.cancel()
    await turn()
    assert not copy.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await copy
    raised = True
    next_owner = b"\xaa" * len(decode.pool)
    decode.pool[:] = next_owner
    await drain(decode.importer)
    assert decode.pool == next_owner
    assert written_late == [False], "the copy goes on after the piece in which it was cancelled"


async def test_cancelling_at_any_point_never_writes_late(serve, importing):
    served, decode = await serve(num_blocks=512), importing(num_blocks=512)
    served.exporter.open_export("x", range(1, 512))
    extent = await served.exporter.extent("x", range(1, 512), 0, 511 * 16)
    finished = cancelled = 0
    for turns in range(60):
        copy = asyncio.create_task(decode.copy(extent, range(511, 0, -1)))
        await turn(turns)
        copy.cancel()
        try:
            await copy
            finished += 1
        except asyncio.CancelledError:
            cancelled += 1
        decode.pool[:] = bytes(len(decode.pool))
        await drain(decode.importer)
        assert not any(decode.pool)
    assert cancelled
    await decode.copy(extent, range(1, 512))
    assert decode.block(511) == served.block(511)


class Stalling(kv_pb2_grpc.KvServiceServicer):
    """Sends one chunk, and the next only when told to."""

    def __init__(self, exporter) -> None:
        self.exporter = exporter
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Handshake(self, request, context):
        return await self.exporter.Handshake(request, context)

    async def Fetch(self, request, context):
        context.add_done_callback(lambda _: self.cancelled.set())
        yield kv_pb2.FetchResponse(data=b"\x01" * CHUNK_BYTES)
        await self.go_on.wait()
        yield kv_pb2.FetchResponse(data=b"\x02" * CHUNK_BYTES)


async def test_a_cancelled_fetch_ends_on_both_sides(serve, importing, layout, stack, monkeypatch):
    monkeypatch.setattr(importer, "PIECE_BYTES", CHUNK_BYTES)
    num_blocks = 2 * CHUNK_BYTES // layout.block_bytes
    served = await serve(num_blocks=num_blocks + 1)
    decode = importing(num_blocks=num_blocks + 1, disable=["shared_memory"])
    server = rpc.create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    stalling = Stalling(served.exporter)
    kv_pb2_grpc.add_KvServiceServicer_to_server(stalling, server)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    blocks = range(1, num_blocks + 1)
    served.exporter.open_export("x", blocks)
    extent = await served.exporter.extent("x", blocks, 0, num_blocks * 16)
    extent.kv_endpoint = endpoint
    copy = asyncio.create_task(decode.copy(extent, blocks))
    async with asyncio.timeout(10):
        while decode.block(1)[0] != 1:  # noqa: ASYNC110 - the first chunk is seen by what it writes
            await asyncio.sleep(0)
    copy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copy
    next_owner = b"\xaa" * len(decode.pool)
    decode.pool[:] = next_owner
    stalling.go_on.set()
    await asyncio.wait_for(stalling.cancelled.wait(), 10)
    await turn()
    assert decode.pool == next_owner


async def test_closing_waits_for_a_running_copy(serve, importing, occupy):
    served, decode = await serve(), importing()
    served.exporter.open_export("x", [1])
    pair = await decode.importer.connect(served.kv_endpoint)
    gate = occupy(decode.importer)
    copy = asyncio.create_task(decode.copy(await served.exporter.extent("x", [1], 0, 16), [1]))
    await turn()
    close = asyncio.create_task(decode.importer.close())
    await turn()
    assert not pair.closed.is_set()
    gate.set()
    assert (await copy).num_bytes == served.layout.block_bytes
    await close
    assert pair.closed.is_set()
    assert decode.block(1) == served.block(1)
