"""The handoff between pools on devices, by both exports, on devices that hold it to CUDA's rules (fake_cuda.py)."""

import asyncio
import logging

import pytest
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared import rpc
from shared.transport.cuda import COMPUTE, CudaError
from shared.transport.device_mapping import DeviceMapping
from shared.transport.device_pool import NUM_EVENTS, DevicePool
from shared.transport.target import DeviceTarget
from tests.shared.transport.fake_cuda import FakeCuda

CUDA_IPC, SHARED_MEMORY, INLINE = (
    types_pb2.TRANSPORT_CUDA_IPC,
    types_pb2.TRANSPORT_SHARED_MEMORY,
    types_pb2.TRANSPORT_INLINE,
)
EXPORTS = pytest.mark.parametrize("export", ["descriptor", "handle"])


def fill(cuda: FakeCuda, device: DevicePool, value: int) -> None:
    """Has a device fill its pool with a byte, once its compute stream gets there."""

    def work() -> None:
        device.tensor.fill_(value)

    cuda.run(COMPUTE, work)


async def turn(times: int = 200) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@EXPORTS
@pytest.mark.parametrize("checksum", [False, True])
async def test_copies_exactly_the_blocks_of_the_extent(serve, importing, layout, export, checksum):
    served, decode = await serve(cuda=FakeCuda(), export=export, checksum=checksum), importing(cuda=FakeCuda())
    source, destination = [4, 5, 6, 30, 2], [9, 10, 20, 21, 1]
    served.exporter.open_export("r/1", source)
    extent = await served.exporter.extent("r/1", source, 32, 5 * 16)
    assert extent.HasField("crc32") == checksum
    result = await decode.copy(extent, destination)
    assert (result.num_bytes, result.transport) == (5 * layout.block_bytes, CUDA_IPC)
    await decode.importer.confirm(extent)
    assert [decode.block(d) for d in destination] == [served.block(s) for s in source]
    assert decode.untouched(*destination)
    [pair] = decode.importer.pairs()
    assert pair.refusals == ()


@EXPORTS
@pytest.mark.parametrize("shares_events", [True, False])
async def test_a_copy_waits_for_what_prefill_has_yet_to_compute(serve, importing, export, shares_events, caplog):
    prefill = FakeCuda()
    with caplog.at_level(logging.INFO):
        served, decode = await serve(cuda=prefill, export=export), importing(cuda=FakeCuda(shares_events=shares_events))
        await decode.importer.connect(served.kv_endpoint)
    assert ("asks the prefill worker" in caplog.text) == (not shares_events)
    served.exporter.open_export("x", [1, 2])
    gate = prefill.gate()
    fill(prefill, served.device, 0x77)
    early = await served.exporter.extent("x", [1], 0, 16, served.device.mark() - 1)
    late = await served.exporter.extent("x", [2], 0, 16, served.device.mark())
    await decode.copy(early, [1])  # of a mark that has passed: it waits for nothing
    assert decode.block(1) == served.block(1) != b"\x77" * len(served.block(1))
    copy = asyncio.create_task(decode.copy(late, [2]))
    await turn()
    assert not copy.done()
    assert decode.untouched(1)
    gate.set()
    await copy
    assert decode.block(2) == b"\x77" * len(decode.block(2))


@EXPORTS
async def test_a_copy_waits_for_the_step_that_still_uses_its_blocks(serve, importing, export):
    """Steps ahead: the blocks were another request's, whose last step is under way."""
    own = FakeCuda()
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=own)
    await decode.importer.connect(served.kv_endpoint)
    served.exporter.open_export("x", [3])
    extent = await served.exporter.extent("x", [3], 0, 16)
    gate = own.gate()
    fill(own, decode.device, 0x11)
    mark = decode.device.mark()
    copy = asyncio.create_task(decode.importer.copy(extent, [5], mark=mark))
    await turn()
    assert not copy.done()
    gate.set()
    await copy
    assert decode.block(5) == served.block(3)
    assert decode.block(4) == b"\x11" * len(decode.block(4))


async def test_a_mark_whose_event_was_taken_by_a_later_one_still_holds(serve, importing):
    prefill = FakeCuda()
    served, decode = await serve(cuda=prefill), importing(cuda=FakeCuda())
    served.exporter.open_export("x", [1])
    first = served.device.mark()
    for _ in range(2 * NUM_EVENTS + 3):
        served.device.mark()
    await decode.copy(await served.exporter.extent("x", [1], 0, 16, first), [1])
    assert decode.block(1) == served.block(1)


@EXPORTS
async def test_a_pool_is_mapped_once_however_often_hands_are_shaken(serve, importing, export):
    cuda = FakeCuda()
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=cuda)
    pairs = await asyncio.gather(*(decode.importer.connect(served.kv_endpoint) for _ in range(5)))
    pairs += [await decode.importer.connect(served.kv_endpoint) for _ in range(3)]
    assert len(set(map(id, pairs))) == 1
    assert len(cuda.opened) == 1


@EXPORTS
async def test_the_mapping_outlives_its_pair_while_a_copy_runs(serve, importing, export):
    own = FakeCuda()
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=own)
    pair = await decode.importer.connect(served.kv_endpoint)
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)
    gate = own.gate()
    copy = asyncio.create_task(decode.importer.copy(extent, [5], mark=decode.device.mark()))
    await turn()
    release = asyncio.create_task(served.exporter.release())  # the prefill worker is about to end
    await turn()
    assert decode.importer.pairs() == []
    assert not pair.closed.is_set()
    assert not release.done(), "its memory would be freed under the copy"
    gate.set()
    await copy
    await asyncio.wait_for(pair.closed.wait(), 10)
    await asyncio.wait_for(release, 10)
    assert decode.block(5) == served.block(1)


async def test_a_cancelled_copy_ends_before_it_raises(serve, importing):
    own = FakeCuda()
    served, decode = await serve(cuda=FakeCuda()), importing(cuda=own)
    await decode.importer.connect(served.kv_endpoint)
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)
    gate = own.gate()
    copy = asyncio.create_task(decode.importer.copy(extent, [5], mark=decode.device.mark()))
    await turn()
    copy.cancel()
    await turn()
    assert not copy.done(), "the launch is still to come, and writes"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await copy
    decode.pool[:] = b"\xaa" * len(decode.pool)  # the next owner
    await asyncio.to_thread(decode.device.settle, decode.device.mark())
    assert bytes(decode.pool) == b"\xaa" * len(decode.pool)


HINDRANCES = {
    "another device": ({"uuid": "GPU-b"}, "GPU-a is not visible here"),
    "no peer access": ({"uuid": "GPU-b", "visible": ["GPU-a"]}, "GPU-b has no peer access to GPU-a"),
}


@EXPORTS
@pytest.mark.parametrize("case", HINDRANCES)
async def test_goes_on_over_shared_memory_with_a_reason_or_refuses(serve, importing, export, case):
    device, reason = HINDRANCES[case]
    served, decode = await serve(cuda=FakeCuda("GPU-a"), export=export), importing(cuda=FakeCuda(**device))
    pair = await decode.importer.connect(served.kv_endpoint)
    assert pair.transport == SHARED_MEMORY
    [refusal] = pair.refusals
    assert refusal.transport == CUDA_IPC
    assert reason in refusal.reason
    served.exporter.open_export("x", [1, 2])
    result = await decode.copy(await served.exporter.extent("x", [1, 2], 0, 32), [7, 3])
    assert result.transport == SHARED_MEMORY
    assert [decode.block(7), decode.block(3)] == [served.block(1), served.block(2)]
    strict = importing(cuda=FakeCuda(**device), require="cuda_ipc")
    with pytest.raises(rpc.RpcError, match=f"transport.require: cuda_ipc is required.*{reason}") as caught:
        await strict.importer.connect(served.kv_endpoint)
    assert caught.value.code.name == "FAILED_PRECONDITION"
    assert strict.importer.pairs() == []


@EXPORTS
async def test_two_devices_with_peer_access(serve, importing, export):
    served = await serve(cuda=FakeCuda("GPU-a"), export=export)
    decode = importing(cuda=FakeCuda("GPU-b", peers=["GPU-a"]))
    served.exporter.open_export("x", [1])
    result = await decode.copy(await served.exporter.extent("x", [1], 0, 16), [1])
    assert result.transport == CUDA_IPC
    assert decode.block(1) == served.block(1)


@pytest.mark.parametrize("transport", [SHARED_MEMORY, INLINE])
@pytest.mark.parametrize("on_device", [True, False])
async def test_blocks_of_a_device_reach_those_who_cannot_map_it(serve, importing, transport, on_device):
    """They come once they are asked for, and not before they are written."""
    prefill = FakeCuda()
    served = await serve(cuda=prefill)
    disable = ["cuda_ipc"] if transport == SHARED_MEMORY else ["cuda_ipc", "shared_memory"]
    decode = importing(cuda=FakeCuda() if on_device else None, disable=disable)
    pair = await decode.importer.connect(served.kv_endpoint)
    assert pair.transport == transport
    served.exporter.open_export("x", [1, 2])
    gate = prefill.gate()
    fill(prefill, served.device, 0x42)
    extent = await served.exporter.extent("x", [1, 2], 0, 32, served.device.mark())
    copy = asyncio.create_task(decode.copy(extent, [9, 4]))
    await turn()
    assert not copy.done()
    gate.set()
    await copy
    await decode.importer.confirm(extent)
    assert decode.block(9) == decode.block(4) == b"\x42" * len(decode.block(4))
    assert decode.untouched(9, 4)


async def test_requires_cuda_ipc_of_a_worker_without_a_device(serve, importing):
    with pytest.raises(rpc.RpcError, match=r"cuda_ipc is required.*the prefill worker's pool is not on a CUDA device"):
        await serve(require="cuda_ipc")
    served = await serve()
    with pytest.raises(rpc.RpcError, match=r"cuda_ipc is required.*the decode worker's pool is not on a CUDA device"):
        await importing(require="cuda_ipc").importer.connect(served.kv_endpoint)
    with pytest.raises(rpc.RpcError, match=r"cuda_ipc is required.*the prefill worker's pool is not on a CUDA device"):
        await importing(require="cuda_ipc", cuda=FakeCuda()).importer.connect(served.kv_endpoint)


async def test_a_device_without_descriptors_says_what_to_set(serve):
    cuda = FakeCuda(descriptors=False)
    with pytest.raises(CudaError, match=r"set transport.cuda_export: handle"):
        await serve(cuda=cuda)
    await serve(cuda=cuda, export="handle")


@EXPORTS
async def test_without_the_folder_of_sockets_nothing_is_mapped(serve, importing, tmp_path, export):
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=FakeCuda())
    for path in tmp_path.glob("*.sock"):
        path.unlink()
    pair = await decode.importer.connect(served.kv_endpoint)
    assert pair.transport == INLINE
    assert [(r.transport, "No such file" in r.reason) for r in pair.refusals] == [
        (CUDA_IPC, True),
        (SHARED_MEMORY, True),
    ]


class Forging(kv_pb2_grpc.KvServiceServicer):
    """Serves an exporter's handshake with a handle that was changed."""

    def __init__(self, exporter, change):
        self.exporter, self.change = exporter, change

    async def Handshake(self, request, context):
        response = await self.exporter.Handshake(request, context)
        for handle in response.handles:
            if handle.HasField("cuda_ipc"):
                self.change(handle.cuda_ipc)
        return response


FORGERIES = {
    "a short handle": (lambda h: setattr(h, "handle", h.handle[:63]), "has 64 bytes, not 63"),
    "a short event": (lambda h: h.event_handles.append(b"x"), "has 64 bytes, not 1"),
    "too many events": (lambda h: h.event_handles.extend([b"\0" * 64] * 64), "80 events are more than 64"),
    "a small allocation": (lambda h: setattr(h, "num_bytes", 4096), "4096 bytes does not hold a pool of 65536"),
    "another size": (lambda h: setattr(h, "num_bytes", h.num_bytes * 2), "another pool than the one of epoch"),
    "another's handle": (lambda h: setattr(h, "handle", b"\x07" * 64), "invalid resource handle"),
    "no socket": (lambda h: setattr(h, "socket_path", "/nowhere"), "No such file"),
    "a forged path": (lambda h: setattr(h, "socket_path", "/a\0b"), "is no path of a unix socket"),
}


@pytest.mark.parametrize("case", FORGERIES)
async def test_nothing_of_a_handle_is_trusted(serve, importing, stack, case):
    change, reason = FORGERIES[case]
    served, decode = await serve(cuda=FakeCuda(), export="handle"), importing(cuda=FakeCuda())
    server = rpc.create_server()
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"

    def forge(handle: kv_pb2.CudaIpcHandle) -> None:
        change(handle)

    kv_pb2_grpc.add_KvServiceServicer_to_server(Forging(served.exporter, forge), server)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    pair = await decode.importer.connect(endpoint)
    assert pair.transport == SHARED_MEMORY
    assert reason in pair.refusals[0].reason, pair.refusals


@EXPORTS
async def test_a_mark_that_was_never_set_is_refused(serve, importing, export):
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=FakeCuda(shares_events=False))
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16, 999)
    with pytest.raises(rpc.RpcError, match="INVALID_ARGUMENT: mark: mark 999 was never set"):
        await decode.copy(extent, [1])
    assert decode.untouched()


@EXPORTS
async def test_an_export_that_ended_is_not_confirmed(serve, importing, export):
    served, decode = await serve(cuda=FakeCuda(), export=export), importing(cuda=FakeCuda())
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)
    await decode.copy(extent, [1])
    served.exporter.close_export("x")
    with pytest.raises(rpc.RpcError, match="ABORTED"):
        await decode.importer.confirm(extent)


async def test_a_launch_that_fails_is_the_requests_failure_alone(serve, importing, monkeypatch):
    served, decode = await serve(cuda=FakeCuda()), importing(cuda=FakeCuda())
    await decode.importer.connect(served.kv_endpoint)
    served.exporter.open_export("x", [1])
    extent = await served.exporter.extent("x", [1], 0, 16)

    def broken(*arguments, **keywords):
        raise CudaError("cuLaunchKernel: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr("shared.transport.target.transfer_tokens", broken)
        with pytest.raises(CudaError, match="illegal memory access"):
            await decode.copy(extent, [1])
    await decode.copy(extent, [1])
    assert decode.block(1) == served.block(1)


async def test_a_transport_that_moves_no_block_is_not_used(serve, importing, monkeypatch):
    """It maps, and that is not enough."""
    real = DeviceTarget.probe

    def probe(self, source, *arguments):
        if isinstance(source, DeviceMapping):
            raise CudaError("cuLaunchKernel: invalid device function")
        real(self, source, *arguments)

    monkeypatch.setattr(DeviceTarget, "probe", probe)
    cuda = FakeCuda()
    served, decode = await serve(cuda=FakeCuda()), importing(cuda=cuda)
    pair = await decode.importer.connect(served.kv_endpoint)
    assert pair.transport == SHARED_MEMORY
    assert [r.reason for r in pair.refusals] == ["cuLaunchKernel: invalid device function"]
    assert len(cuda.opened) == 1  # and is unmapped again, as assert_clean finds


# -- the fake itself: each rule of CUDA's is enforced ------------------------------------------------------------------


def test_the_fake_knows_base_handles_only():
    cuda, other = FakeCuda(), FakeCuda()
    address = cuda.malloc(8192)
    with pytest.raises(CudaError, match="not the base"):
        cuda.handle_of(address + 4096)
    handle = cuda.handle_of(address)
    with pytest.raises(CudaError, match="made here"):
        cuda.open_handle(handle)
    opened, size = other.open_handle(handle)
    assert size == 8192
    with pytest.raises(CudaError, match="already mapped"):
        other.open_handle(handle)
    with pytest.raises(CudaError, match="no memory by malloc"):
        other.free(opened)
    other.close_handle(opened)
    with pytest.raises(CudaError, match="no memory by handle"):
        other.close_handle(opened)
    reopened, _ = other.open_handle(handle)
    other.close_handle(reopened)
    cuda.free(address)
    with pytest.raises(CudaError, match="invalid resource handle"):
        other.open_handle(handle)
    cuda.assert_clean()
    other.assert_clean()


def test_the_fake_knows_the_right_device():
    owner, stranger = FakeCuda("GPU-a"), FakeCuda("GPU-b", visible=["GPU-a"])
    address = owner.malloc(4096)
    with pytest.raises(CudaError, match="no peer access"):
        stranger.open_handle(owner.handle_of(address))
    owner.free(address)


def test_the_fake_sees_use_after_free_and_work_that_is_left():
    cuda = FakeCuda()
    address, size, memory = cuda.create(4096)
    tensor = cuda.tensor(address, 4096)
    gate = cuda.gate()
    with pytest.raises(CudaError, match="work left"):
        cuda.destroy(address, size, memory)
    gate.set()
    event = cuda.create_event()
    cuda.record(event, COMPUTE)
    cuda.synchronize(event)
    cuda.destroy(address, size, memory)
    assert bytes(tensor.numpy()[:4]) == b"\xdd" * 4
    with pytest.raises(CudaError, match="no such memory"):
        cuda.tensor(address, 4096)
    cuda.destroy_event(event)
    with pytest.raises(CudaError, match="there is no event"):
        cuda.wait(COMPUTE, event)
    cuda.assert_clean()


def test_the_fake_keeps_the_order_of_events_across_processes():
    owner, other = FakeCuda(), FakeCuda()
    event = owner.create_event()
    opened = other.open_event(owner.event_handle(event))
    gate = owner.gate()
    owner.record(event, COMPUTE)
    done: list[int] = []
    other.wait(COMPUTE, opened)
    other.run(COMPUTE, lambda: done.append(1))
    own = other.create_event()
    other.record(own, COMPUTE)
    assert not done
    gate.set()
    other.synchronize(own)
    assert done == [1]
    other.destroy_event(own)
    other.destroy_event(opened)
    owner.destroy_event(event)
    owner.assert_clean()
    other.assert_clean()
