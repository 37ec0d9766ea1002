"""The calls of CUDA's driver that the KV handoff needs, on one device, in plain numbers and bytes.

    driver = CudaDriver(0)
    address, size, memory = driver.create(num_bytes)
    pool = driver.tensor(address, num_bytes)

Two ways lead to another process's memory. A descriptor of an allocation by `create` crosses a unix socket and needs
nothing else in common; the memory lives until its last user lets go of it. A handle of one by `malloc` is 64 bytes,
valid where both processes share their PID and IPC namespaces. Nothing here goes through torch's allocator.

Checked against the documents of CUDA 12 and 13; it has not run on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any
from uuid import UUID

import torch
from torch import Tensor

HANDLE_BYTES = 64  # of cudaIpcMemHandle_t and cudaIpcEventHandle_t
COMPUTE = 0  # the stream that torch computes on unless told otherwise
# smaller allocations share one that the driver made, and a handle shows all of that
_SHARED_BYTES = 2 << 20


class CudaError(OSError):
    """A call that failed, and why."""


class CudaDriver:
    """One device. Any thread may call. Every method raises CudaError."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise CudaError("the package cuda-bindings is not installed") from error
        self.ordinal = ordinal
        self._context: Any = None
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # there is no libcuda
            raise CudaError(str(error)) from error
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.uuid = self._uuid(self._device)

    # -- the device ---------------------------------------------------------------------------------------------------

    def passes_descriptors(self) -> bool:
        """Whether memory of this device can be passed as a file descriptor."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        return bool(self._call("cuDeviceGetAttribute", attribute, self._device))

    def reach(self, uuid: str) -> None:
        """Raises CudaError unless this device can read that one's memory."""
        if uuid == self.uuid:
            return
        devices = [self._call("cuDeviceGet", i) for i in range(self._call("cuDeviceGetCount"))]
        other = next((device for device in devices if self._uuid(device) == uuid), None)
        if other is None:
            raise CudaError(f"{uuid} is not visible here: let CUDA_VISIBLE_DEVICES and the container name it too")
        if not self._call("cuDeviceCanAccessPeer", self._device, other):
            raise CudaError(f"{self.uuid} has no peer access to {uuid}")

    # -- memory -------------------------------------------------------------------------------------------------------

    def malloc(self, num_bytes: int) -> int:
        """-> address"""
        return int(self._call("cuMemAlloc", -(-num_bytes // _SHARED_BYTES) * _SHARED_BYTES))

    def free(self, address: int) -> None:
        """Of `malloc`. Other processes have to have closed it before."""
        self._call("cuMemFree", address)

    def handle_of(self, address: int) -> bytes:
        """The cudaIpcMemHandle_t of an allocation by `malloc`, from its base address."""
        return _bytes_of(self._call("cuIpcGetMemHandle", address))

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        """Maps another process's allocation, once in this process -> address, size."""
        opened = self._driver.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        flags = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        address = int(self._call("cuIpcOpenMemHandle", opened, flags))
        _, size = self._call("cuMemGetAddressRange", address)
        return address, int(size)

    def close_handle(self, address: int) -> None:
        """Of `open_handle`."""
        self._call("cuIpcCloseMemHandle", address)

    def create(self, num_bytes: int) -> tuple[int, int, int]:
        """Memory that can be passed as a descriptor -> address, size (num_bytes or somewhat more), memory."""
        properties = self._properties()
        minimum = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self._call("cuMemGetAllocationGranularity", properties, minimum))
        size = -(-num_bytes // granularity) * granularity
        memory = self._call("cuMemCreate", size, properties, 0)
        try:
            address = self._map(memory, size, "PROT_READWRITE")
        except BaseException:
            self._call("cuMemRelease", memory)
            raise
        return address, size, int(memory)

    def destroy(self, address: int, size: int, memory: int) -> None:
        """Of `create`. Processes that have mapped it keep it until they unmap it."""
        self.unmap(address, size)
        self._call("cuMemRelease", memory)

    def descriptor_of(self, memory: int) -> int:
        """A new file descriptor of memory by `create`; the caller closes it."""
        kind = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return int(self._call("cuMemExportToShareableHandle", memory, kind, 0))

    def map_descriptor(self, fd: int, size: int, *, writes: bool = False) -> int:
        """Maps another process's memory for reading, or for writing too -> address. The descriptor stays the caller's
        to close."""
        kind = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        memory = self._call("cuMemImportFromShareableHandle", fd, kind)
        try:
            return self._map(memory, size, "PROT_READWRITE" if writes else "PROT_READ")
        finally:
            self._call("cuMemRelease", memory)  # the mapping keeps it

    def unmap(self, address: int, size: int) -> None:
        """Of `map_descriptor`."""
        self._call("cuMemUnmap", address, size)
        self._call("cuMemAddressFree", address, size)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] over memory, of which it is no owner."""
        return torch.as_tensor(_Bytes(address, num_bytes))

    # -- order --------------------------------------------------------------------------------------------------------

    def create_event(self) -> int:
        """One that other processes can wait for."""
        flags = self._driver.CUevent_flags
        return int(self._call("cuEventCreate", flags.CU_EVENT_DISABLE_TIMING.value | flags.CU_EVENT_INTERPROCESS.value))

    def event_handle(self, event: int) -> bytes:
        """The cudaIpcEventHandle_t of an event."""
        return _bytes_of(self._call("cuIpcGetEventHandle", event))

    def open_event(self, handle: bytes) -> int:
        """Another process's event, to be destroyed like one's own."""
        opened = self._driver.CUipcEventHandle()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        return int(self._call("cuIpcOpenEventHandle", opened))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """The event is done once the stream has done what it was told until now."""
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What the stream is told from now on it does once the event, as it was last recorded, is done."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def done(self, event: int) -> bool:
        """Whether the event, as it was last recorded, is done."""
        status, *_ = self._answer("cuEventQuery", event)
        if status == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._check("cuEventQuery", status)
        return True

    def synchronize(self, event: int) -> None:
        """This thread waits, without Python's lock, until the event as it was last recorded is done."""
        self._call("cuEventSynchronize", event)

    def create_stream(self) -> int:
        """One that lets others go first, and waits for none by itself."""
        least, _ = self._call("cuCtxGetStreamPriorityRange")
        return int(
            self._call("cuStreamCreateWithPriority", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value, least)
        )

    def destroy_stream(self, stream: int) -> None:
        """Once the stream has done all that it was told."""
        self._call("cuStreamDestroy", stream)

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Has what `work` launches done on a stream, in order."""
        # an ExternalStream of 0 would be any stream of torch's
        known = torch.cuda.ExternalStream(stream, device=self.ordinal) if stream else None
        with torch.cuda.stream(known or torch.cuda.default_stream(self.ordinal)):
            work()

    # -----------------------------------------------------------------------------------------------------------------

    def _map(self, memory: Any, size: int, protection: str) -> int:
        address = self._call("cuMemAddressReserve", size, 0, 0, 0)
        try:
            self._call("cuMemMap", address, size, 0, memory, 0)
            try:
                # a location is a part of the properties, which have to outlive it
                access, properties = self._driver.CUmemAccessDesc(), self._properties()
                access.location = properties.location
                access.flags = getattr(self._driver.CUmemAccess_flags, f"CU_MEM_ACCESS_FLAGS_{protection}")
                self._call("cuMemSetAccess", address, size, [access], 1)
            except BaseException:
                self._call("cuMemUnmap", address, size)
                raise
        except BaseException:
            self._call("cuMemAddressFree", address, size)
            raise
        return int(address)

    def _properties(self) -> Any:
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.ordinal
        properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return properties

    def _uuid(self, device: Any) -> str:
        return f"GPU-{UUID(bytes=bytes(self._call('cuDeviceGetUuid', device).bytes))}"

    def _call(self, name: str, *arguments: Any) -> Any:
        """A call's value, or its values; nothing for one that has none."""
        status, *values = self._answer(name, *arguments)
        self._check(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _answer(self, name: str, *arguments: Any) -> Any:
        """A call's status and values. For as long the thread has this device's context: it may have never had one, or
        compute on another device, as torch takes it from the thread's context."""
        if self._context is None:
            return getattr(self._driver, name)(*arguments)
        self._check("cuCtxPushCurrent", *self._driver.cuCtxPushCurrent(self._context))
        try:
            return getattr(self._driver, name)(*arguments)
        finally:
            self._driver.cuCtxPopCurrent()

    def _check(self, name: str, status: Any) -> None:
        if status != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(status)
            raise CudaError(f"{name}: {text.decode() if text else status}")


def _bytes_of(handle: Any) -> bytes:
    """What is in a handle, which has to live until it is read."""
    return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)


class _Bytes:
    """Device memory as torch takes it, which is as writable, although a peer's is mapped for reading."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
