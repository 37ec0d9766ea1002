"""A CUDA device made of memory files and threads, for processes without a GPU, that holds them to CUDA's rules.

    cuda = FakeCuda("GPU-a")                    # one for each process; several in one process count as several
    pool = DevicePool(cuda, num_bytes)
    ...
    cuda.assert_clean()

Memory, handles, descriptors and events cross processes for real. A stream is a thread that does what it was told in
order, later. What CUDA leaves undefined is an error here:
- a handle of what is not the base of an allocation by malloc, or opened twice in a process, or where it was made;
- memory given back, or unmapped, while a stream still has work, or twice; what was freed reads as poison;
- memory of a device that is not this one and not its peer;
- an event used after its end, a stream destroyed with work left.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import secrets
import struct
import threading
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from shared.transport.cuda import HANDLE_BYTES, CudaError

PAGE = mmap.PAGESIZE
HANDLE = struct.Struct("!4sIIQ")  # kind, process, descriptor, size
COUNTS = struct.Struct("=QQ")  # how often an event was recorded, and the last record that is done
POISON = 0xDD


class FakeCuda:
    """The methods of shared.transport.cuda.CudaDriver. What is mapped to be read ends the process that writes there.

    peers: devices whose memory this one can read. visible: devices that this process sees beside it. shares_events:
    whether events can be opened here, which needs what containers may not have.
    """

    ordinal = 0

    def __init__(
        self,
        uuid: str = "GPU-a",
        *,
        peers: Collection[str] = (),
        visible: Collection[str] = (),
        descriptors: bool = True,
        shares_events: bool = True,
    ) -> None:
        self.uuid = uuid
        self._peers, self._visible = set(peers), {uuid, *visible, *peers}
        self._descriptors, self._shares_events = descriptors, shares_events
        self._lock = threading.RLock()
        self._memory: dict[int, _Memory] = {}  # by address
        self._events: dict[int, _Event] = {}
        self._streams: dict[int, _Stream] = {0: _Stream()}
        self._numbers = iter(range(16, 1 << 40))
        self.opened: list[str] = []  # every mapping of another's memory there was

    def assert_clean(self) -> None:
        """Everything was given back."""
        assert not self._memory, self._memory
        assert not self._events, self._events
        assert set(self._streams) == {0}, self._streams

    def shut(self) -> None:
        """As when a process ends: its memory stays with those who have mapped it."""
        for stream in self._streams.values():
            stream.stop()
        for memory in self._memory.values():
            memory.close()
        for event in self._events.values():
            event.close()
        self._memory.clear()
        self._events.clear()

    def gate(self, stream: int = 0) -> threading.Event:
        """Holds a stream up until the event is set."""
        event = threading.Event()
        self._stream(stream).put(lambda: event.wait() and None)
        return event

    # -- the device ---------------------------------------------------------------------------------------------------

    def passes_descriptors(self) -> bool:
        return self._descriptors

    def reach(self, uuid: str) -> None:
        if uuid not in self._visible:
            raise CudaError(f"{uuid} is not visible here: let CUDA_VISIBLE_DEVICES and the container name it too")
        if uuid != self.uuid and uuid not in self._peers:
            raise CudaError(f"{self.uuid} has no peer access to {uuid}")

    # -- memory -------------------------------------------------------------------------------------------------------

    def malloc(self, num_bytes: int) -> int:
        return self._own(num_bytes, num_bytes, "malloc")

    def free(self, address: int) -> None:
        self._end(address, "malloc")

    def handle_of(self, address: int) -> bytes:
        memory = self._memory.get(address)
        if memory is None or memory.kind != "malloc":
            raise CudaError("cuIpcGetMemHandle: invalid argument: not the base of an allocation")
        return HANDLE.pack(b"mem\0", os.getpid(), memory.fd, memory.size).ljust(HANDLE_BYTES, b"\0")

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        fd, size = self._take(handle, b"mem\0")
        try:
            return self._map(fd, size, "handle"), size
        finally:
            os.close(fd)

    def close_handle(self, address: int) -> None:
        self._end(address, "handle")

    def create(self, num_bytes: int) -> tuple[int, int, int]:
        if not self._descriptors:
            raise CudaError("cuMemCreate: operation not supported")
        size = -(-num_bytes // (2 * PAGE)) * 2 * PAGE
        address = self._own(num_bytes, size, "create")
        return address, size, address + 1

    def destroy(self, address: int, size: int, memory: int) -> None:
        if memory != address + 1 or size != self._memory[address].size:
            raise CudaError("cuMemRelease: invalid argument")
        self._end(address, "create")

    def descriptor_of(self, memory: int) -> int:
        held = self._memory.get(memory - 1)
        if held is None or held.kind != "create":
            raise CudaError("cuMemExportToShareableHandle: invalid argument")
        return os.dup(held.fd)

    def map_descriptor(self, fd: int, size: int, *, writes: bool = False) -> int:
        if os.fstat(fd).st_size != size:
            raise CudaError("cuMemMap: invalid argument: another size")
        return self._map(fd, size, "descriptor", writable=writes)

    def unmap(self, address: int, size: int) -> None:
        if size != self._memory[address].size:
            raise CudaError("cuMemUnmap: invalid argument: not the whole of it")
        self._end(address, "descriptor")

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        memory = self._memory.get(address)
        if memory is None or num_bytes > memory.size:
            raise CudaError("no such memory")
        return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)

    # -- order --------------------------------------------------------------------------------------------------------

    def create_event(self) -> int:
        return self._add(_Event.new())

    def event_handle(self, event: int) -> bytes:
        return HANDLE.pack(b"evt\0", os.getpid(), self._event(event).fd, PAGE).ljust(HANDLE_BYTES, b"\0")

    def open_event(self, handle: bytes) -> int:
        if not self._shares_events:
            raise CudaError("cuIpcOpenEventHandle: operation not supported")
        fd, _ = self._take(handle, b"evt\0")
        return self._add(_Event(fd))

    def destroy_event(self, event: int) -> None:
        self._event(event)
        self._events.pop(event).close()

    def record(self, event: int, stream: int) -> None:
        held = self._event(event)
        number = held.record()
        self._stream(stream).put(lambda: held.finish(number), ends=True)

    def wait(self, stream: int, event: int) -> None:
        held = self._event(event)
        number = held.recorded
        self._stream(stream).put(lambda: held.await_(number))

    def done(self, event: int) -> bool:
        return self._event(event).done

    def synchronize(self, event: int) -> None:
        held = self._event(event)
        held.await_(held.recorded)
        for stream in list(self._streams.values()):
            if stream.error is not None:
                error, stream.error = stream.error, None
                raise error

    def create_stream(self) -> int:
        with self._lock:
            number = next(self._numbers)
            self._streams[number] = _Stream()
            return number

    def destroy_stream(self, stream: int) -> None:
        held = self._stream(stream)
        if held.busy:
            raise CudaError("cuStreamDestroy: it has work left")
        del self._streams[stream]
        held.stop()

    def run(self, stream: int, work: Callable[[], None]) -> None:
        self._stream(stream).put(work)

    # -----------------------------------------------------------------------------------------------------------------

    def _own(self, num_bytes: int, size: int, kind: str) -> int:
        if num_bytes < 1:
            raise CudaError("invalid argument")
        fd = os.memfd_create(f"fake-cuda {self.uuid} {secrets.token_hex(4)}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        memory = _Memory(fd, size, kind, writable=True)
        torch.frombuffer((ctypes.c_ubyte * size).from_address(memory.address), dtype=torch.uint8).fill_(0x5A)
        with self._lock:
            self._memory[memory.address] = memory
        return memory.address

    def _map(self, fd: int, size: int, kind: str, *, writable: bool = False) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        self.reach(name.split()[1])
        with self._lock:
            if any(memory.name == name and memory.kind == kind for memory in self._memory.values()):
                raise CudaError("cuIpcOpenMemHandle: already mapped in this process")
            if any(memory.name == name for memory in self._memory.values()):
                raise CudaError("cuIpcOpenMemHandle: invalid device context: it was made here")
            memory = _Memory(os.dup(fd), size, kind, writable=writable)
            self._memory[memory.address] = memory
            self.opened.append(name)
        return memory.address

    def _end(self, address: int, kind: str) -> None:
        with self._lock:
            memory = self._memory.get(address)
            if memory is None or memory.kind != kind:
                raise CudaError(f"invalid argument: {address:x} is no memory by {kind}")
            if any(stream.busy for stream in self._streams.values()):
                raise CudaError("memory is given back while a stream has work left")
            del self._memory[address]
        memory.close()

    def _take(self, handle: bytes, kind: bytes) -> tuple[int, int]:
        """Another process's descriptor -> one of this process, and its size."""
        found, process, fd, size = HANDLE.unpack_from(handle)
        if len(handle) != HANDLE_BYTES or found != kind:
            raise CudaError("invalid resource handle")
        try:
            return os.open(f"/proc/{process}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), size
        except OSError as error:  # it ended, or is in another PID namespace
            raise CudaError("cuIpcOpenMemHandle: invalid resource handle") from error

    def _add(self, event: _Event) -> int:
        with self._lock:
            number = next(self._numbers)
            self._events[number] = event
            return number

    def _event(self, number: int) -> _Event:
        if number not in self._events:
            raise CudaError(f"invalid resource handle: there is no event {number}")
        return self._events[number]

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            raise CudaError(f"invalid resource handle: there is no stream {number}")
        return self._streams[number]


class _Memory:
    """A memory file, mapped."""

    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]

    def __init__(self, fd: int, size: int, kind: str, *, writable: bool) -> None:
        self.fd, self.size, self.kind = fd, size, kind
        self.name = os.readlink(f"/proc/self/fd/{fd}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.address = self._mmap(None, protection, mmap.MAP_SHARED, fd)

    def close(self) -> None:
        """The place stays taken, by poison: no address is given out twice, and what is read there is wrong."""
        fixed = 0x10  # MAP_FIXED, which Python's mmap does not name
        self._mmap(self.address, mmap.PROT_READ | mmap.PROT_WRITE, fixed | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        ctypes.memset(self.address, POISON, self.size)
        os.close(self.fd)

    def _mmap(self, address: int | None, protection: int, flags: int, fd: int) -> int:
        mapped = self._libc.mmap(address, self.size, protection, flags, fd, 0)
        if mapped in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        return mapped


class _Event:
    """A page that processes share: how often the event was recorded, and the last record that is done."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, PAGE)
        self._lock = threading.Lock()

    @classmethod
    def new(cls) -> _Event:
        fd = os.memfd_create("fake-cuda-event", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE)
        return cls(fd)

    @property
    def recorded(self) -> int:
        return COUNTS.unpack_from(self._page)[0]

    @property
    def done(self) -> bool:
        recorded, done = COUNTS.unpack_from(self._page)
        return done >= recorded

    def record(self) -> int:
        with self._lock:
            recorded, done = COUNTS.unpack_from(self._page)
            COUNTS.pack_into(self._page, 0, recorded + 1, done)
            return recorded + 1

    def finish(self, number: int) -> None:
        with self._lock:
            recorded, done = COUNTS.unpack_from(self._page)
            COUNTS.pack_into(self._page, 0, recorded, max(done, number))

    def await_(self, number: int) -> None:
        """A device's waiting, which turns until it sees the page change, if need be for ever."""
        while COUNTS.unpack_from(self._page)[1] < number:
            time.sleep(0.0002)

    def close(self) -> None:
        os.close(self.fd)  # the page goes with the last who waits for it


class _Stream:
    """A thread that does what it was told, in order."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._work: queue.SimpleQueue[tuple[Callable[[], None], bool] | None] = queue.SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fake-stream", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._pending > 0

    def put(self, work: Callable[[], None], *, ends: bool = False) -> None:
        """ends: who learns of this work learns that the stream has done what it was told until now."""
        with self._lock:
            self._pending += 1
        self._work.put((work, ends))

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (told := self._work.get()) is not None:
            work, ends = told
            try:
                if ends:
                    self._count()
                work()
            except Exception as error:  # told at the next look at the device
                self.error = error
            if not ends:
                self._count()

    def _count(self) -> None:
        with self._lock:
            self._pending -= 1
