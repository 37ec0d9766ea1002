"""What the handoff asks of CUDA's driver is there under those names, and the fake device of tests can do just that."""

import ast
import asyncio
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda.bindings import driver
from tandem.v1 import types_pb2

from shared.transport import cuda
from shared.transport.cuda import CudaDriver, CudaError
from shared.transport.device_pool import DevicePool
from tests.shared.transport.cuda_devices import Gpu
from tests.shared.transport.fake_cuda import FakeCuda

PROTECTIONS = ("PROT_READ", "PROT_READWRITE")
EXPORTS = pytest.mark.parametrize("export", ["descriptor", "handle"])


def asked() -> set[str]:
    """Every name that cuda.py takes from the driver's bindings, the members of its enums as Enum.MEMBER."""
    names = set()
    for node in ast.walk(ast.parse(Path(cuda.__file__).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self._call", "self._answer"):
            if ast.unparse(node.args[0]) != "name":  # what one of the two passes on
                names.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "")
        elif isinstance(node, ast.Attribute):
            base, _, name = ast.unparse(node).removeprefix("self._driver.").removeprefix("driver.").partition(".")
            if base.startswith(("cu", "CU")) and ast.unparse(node) != base:
                names.add(f"{base}.{name}" if name.isupper() else base)
    return names


def test_every_name_is_one_of_the_bindings():
    names = asked()
    members = {f"CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_{protection}" for protection in PROTECTIONS}
    known = {
        "cuInit", "cuMemImportFromShareableHandle", "cuIpcOpenMemHandle", "cuEventQuery", "cuCtxPushCurrent",
        "cuCtxPopCurrent", "CUipcMemHandle", "CUmemAccessDesc", "CUresult.CUDA_ERROR_NOT_READY", "CUmemAccess_flags",
        "CUevent_flags", "CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE",
    }  # fmt: skip
    assert known <= names
    assert len(names) > 40
    for name in names | members:
        found = driver
        for part in name.split("."):
            assert hasattr(found, part), f"cuda.bindings.driver has no {name}"
            found = getattr(found, part)


class Recording:
    """The bindings, whose calls are written down instead of made."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            return getattr(driver, name)
        real = getattr(driver, name)
        results = {
            "cuMemAddressReserve": [driver.CUdeviceptr(0x7000)],
            "cuMemImportFromShareableHandle": [driver.CUmemGenericAllocationHandle(5)],
            "cuMemCreate": [driver.CUmemGenericAllocationHandle(6)],
            "cuMemGetAllocationGranularity": [2 << 20],
            "cuMemAlloc": [driver.CUdeviceptr(0x8000)],
            "cuIpcGetMemHandle": [driver.CUipcMemHandle()],
        }

        def call(*arguments: object) -> tuple[object, ...]:
            parameters = real.__doc__.splitlines()[0].partition("(")[2].removesuffix(")")
            assert len(arguments) == len(parameters.split(", ") if parameters else ()), name
            self.calls.append((name, *arguments))
            return driver.CUresult.CUDA_SUCCESS, *results.get(name, [])

        return call

    def of(self, name: str) -> tuple[object, ...]:
        [call] = [arguments for called, *arguments in self.calls if called == name]
        return tuple(call)


def recorded(ordinal: int = 3) -> tuple[CudaDriver, Recording]:
    """A device without a device."""
    device, recording = object.__new__(CudaDriver), Recording()
    device._driver, device._context, device.ordinal = recording, driver.CUcontext(1), ordinal
    return device, recording


def test_a_peers_memory_is_mapped_for_this_device_to_read():
    device, calls = recorded()
    assert device.map_descriptor(17, 4 << 20) == 0x7000
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    assert calls.of("cuMemImportFromShareableHandle") == (17, kind)
    size, *rest = calls.of("cuMemAddressReserve")
    assert (size, rest) == (4 << 20, [0, 0, 0])
    address, size, offset, memory, flags = calls.of("cuMemMap")
    assert (int(address), size, offset, int(memory), flags) == (0x7000, 4 << 20, 0, 5, 0)
    address, size, [access], count = calls.of("cuMemSetAccess")
    assert (int(address), size, count) == (0x7000, 4 << 20, 1)
    assert (access.location.type, access.location.id) == (driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 3)
    assert access.flags == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    assert int(calls.of("cuMemRelease")[0]) == 5


def test_a_rank_maps_its_pool_to_write_too():
    device, calls = recorded()
    assert device.map_descriptor(17, 4 << 20, writes=True) == 0x7000
    [access] = calls.of("cuMemSetAccess")[2]
    assert access.flags == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


def test_a_thread_has_its_own_context_again_after_each_call():
    """With pools on several devices, torch would compute on that of the last call."""
    device, calls = recorded()
    device.destroy_event(1)
    assert device.done(2)
    assert [name for name, *_ in calls.calls] == [
        "cuCtxPushCurrent", "cuEventDestroy", "cuCtxPopCurrent", "cuCtxPushCurrent", "cuEventQuery", "cuCtxPopCurrent"
    ]  # fmt: skip


def test_memory_is_made_in_whole_pieces_that_can_be_passed():
    device, calls = recorded()
    assert device.create((2 << 20) + 1) == (0x7000, 4 << 20, 6)
    size, properties, flags = calls.of("cuMemCreate")
    assert (size, flags) == (4 << 20, 0)
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    assert properties.requestedHandleTypes == kind
    assert (properties.location.id, calls.of("cuMemSetAccess")[2][0].flags.name[-9:]) == (3, "READWRITE")
    assert device.malloc(1) == 0x8000
    assert calls.of("cuMemAlloc") == (2 << 20,)
    assert len(device.handle_of(0x8000)) == 64


def test_without_a_driver_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.raises(CudaError, match=r"driver|device"):
        CudaDriver()


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("shared.transport.cuda.importlib.import_module", missing)
    with pytest.raises(CudaError, match="cuda-bindings is not installed"):
        CudaDriver()


def test_the_fake_has_the_drivers_methods():
    def methods(kind: type) -> dict[str, list[str]]:
        public = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in public if not name.startswith("_")}

    own = {"assert_clean", "gate", "shut"}
    fake = methods(FakeCuda)
    assert {name: fake[name] for name in fake.keys() - own} == methods(CudaDriver)
    assert own <= fake.keys()
    assert methods(Gpu) == {**methods(CudaDriver), "assert_clean": ["self"]}


@pytest.mark.gpu
@EXPORTS
async def test_blocks_cross_processes_on_a_gpu(start_exporter, importing, layout, export):
    """As they are, and into larger blocks; a mark that was passed long ago holds up nobody."""
    gpu = Gpu()
    worker = await start_exporter(1, on="gpu", export=export)
    decode = importing(cuda=gpu)
    source, destination = [4, 5, 6, 30, 2], [9, 10, 20, 21, 1]
    result = await decode.copy(worker.extent(layout, source), destination)
    assert (result.num_bytes, result.transport) == (5 * layout.block_bytes, types_pb2.TRANSPORT_CUDA_IPC)
    assert [decode.block(d) for d in destination] == [worker.block(layout, s) for s in source]
    assert decode.untouched(*destination)
    await decode.importer.close()
    larger = replace(layout, block_tokens=64)
    other = importing(cuda=Gpu(), layout=larger)
    await other.importer.copy(worker.extent(layout, [8, 7, 6, 5]), [2])
    form = layout.format
    rows = torch.frombuffer(bytearray(worker.contents), dtype=torch.uint8).view(-1, layout.block_bytes)
    theirs = form.elements(rows)[[8, 7, 6, 5]].movedim(4, 1).flatten(0, 1)
    block = torch.frombuffer(bytearray(other.block(2)), dtype=torch.uint8).view(1, -1)
    ours = larger.format.elements(block).movedim(4, 1).flatten(0, 1)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.gpu
@EXPORTS
async def test_a_copy_waits_for_what_a_gpu_computes(start_exporter, importing, layout, export):
    worker = await start_exporter(1, on="gpu", export=export)
    decode = importing(cuda=Gpu())
    pair = await decode.importer.connect(worker.kv_endpoint)
    assert pair.mappings[0].waits
    late = asyncio.create_task(decode.copy(worker.extent(layout, [2], await worker.compute()), [2]))
    try:
        await asyncio.wait([late], timeout=1)
        assert not late.done()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert decode.untouched()
    finally:
        worker.kill()  # it would compute on


@pytest.mark.gpu
@EXPORTS
def test_a_pool_on_a_gpu_is_zeros_by_its_first_mark(export):
    gpu = Gpu()
    pool = DevicePool(gpu, 64 << 20, export=export)
    pool.tensor.fill_(7)  # on torch's own stream, behind the zeros
    pool.settle(pool.mark())
    assert bool((pool.tensor == 7).all())
    assert pool.tensor.device.index == gpu.ordinal
    pool.close()
    gpu.assert_clean()
