"""The memory of a KV pool on a CUDA device: one allocation outside torch's allocator, which other processes can map.

    pool = DevicePool(driver, num_blocks * layout.block_bytes, export="descriptor")
    kv = KvCache(layout, num_blocks, memory=pool.tensor)
    memory = MappedDeviceMemory(driver, fd, pool.size, pool.num_bytes)     # a rank of the same worker

What the device was told to do is not done yet: a mark names a moment in it, and others wait for it by events.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from shared.transport.block_copy import runs
from shared.transport.cuda import COMPUTE, CudaDriver, CudaError

NUM_EVENTS = 16  # a mark so many after another takes its event, and who waits for the earlier waits for the later

Export = Literal["descriptor", "handle"]


class DevicePool:
    """num_bytes of zeroed device memory. export: how others reach it, see cuda.py. Raises CudaError."""

    def __init__(self, driver: CudaDriver, num_bytes: int, *, export: Export = "descriptor") -> None:
        if export == "descriptor" and not driver.passes_descriptors():
            raise CudaError(
                f"{driver.uuid} cannot pass memory as a descriptor; set transport.cuda_export: handle, and tp: 1"
            )
        self.driver = driver
        self.num_bytes = num_bytes
        self._memory: int | None = None
        if export == "descriptor":
            self._address, self.size, self._memory = driver.create(num_bytes)
        else:
            self._address, self.size = driver.malloc(num_bytes), num_bytes
        self._events: list[int] = []
        self._mark = 0
        self._stream: int | None = None
        try:
            self._stream = driver.create_stream()
            self._events.extend(driver.create_event() for _ in range(NUM_EVENTS))
            self.tensor: Tensor = driver.tensor(self._address, num_bytes)
            driver.run(COMPUTE, self._clear)
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> bytes:
        """The allocation's cudaIpcMemHandle_t; empty if it is passed as a descriptor."""
        return b"" if self._memory is not None else self.driver.handle_of(self._address)

    def descriptor(self) -> int | None:
        """A new file descriptor of the allocation, for the caller to close; None if it is reached by its handle."""
        return None if self._memory is None else self.driver.descriptor_of(self._memory)

    def event_handles(self) -> list[bytes]:
        """By which other processes wait for marks. Raises CudaError where events cannot be shared."""
        return [self.driver.event_handle(event) for event in self._events]

    def mark(self) -> int:
        """Marks this moment in what the device was told to compute. Called by the thread that tells it."""
        mark = self._mark + 1
        self.driver.record(self._events[mark % NUM_EVENTS], COMPUTE)
        self._mark = mark  # known only once it is recorded
        return mark

    def wait(self, stream: int, mark: int) -> None:
        """A stream of this process waits for a mark. ValueError for one that was never set."""
        if event := self._event(mark):
            self.driver.wait(stream, event)

    def settle(self, mark: int) -> None:
        """This thread waits for a mark. ValueError for one that was never set."""
        if event := self._event(mark):
            self.driver.synchronize(event)

    def copy_out(self, blocks: Sequence[int], out: Tensor, mark: int) -> None:
        """Copies blocks to the same places of `out`, uint8 [num_blocks, block_bytes] on the host, after a mark."""
        pool, done = self.tensor.view(out.shape), self.driver.create_event()

        def work() -> None:
            for first, _, count in runs(blocks, blocks):
                out[first : first + count].copy_(pool[first : first + count])

        try:
            stream = self._stream
            assert stream is not None
            self.wait(stream, mark)
            self.driver.run(stream, work)
            self.driver.record(done, stream)
            self.driver.synchronize(done)
        finally:
            self.driver.destroy_event(done)

    def close(self) -> None:
        """Gives the memory up, once the device has computed what it was told. No other thread may use it any more."""
        if len(self._events) == NUM_EVENTS:
            self.settle(self.mark())
        for event in self._events:
            self.driver.destroy_event(event)
        self._events.clear()
        if self._stream is not None:
            self.driver.destroy_stream(self._stream)
            self._stream = None
        if self._address:
            address, self._address = self._address, 0
            if self._memory is None:
                self.driver.free(address)
            else:
                self.driver.destroy(address, self.size, self._memory)

    def _clear(self) -> None:
        self.tensor.zero_()

    def _event(self, mark: int) -> int | None:
        if not 0 <= mark <= self._mark:
            raise ValueError(f"mark {mark} was never set; the last is {self._mark}")
        return self._events[mark % NUM_EVENTS] if mark else None


class MappedDeviceMemory:
    """The memory of a pool as a rank of the same worker sees it, mapped on its device for reading and writing, for as
    long as its process lives."""

    def __init__(self, driver: CudaDriver, fd: int, size: int, num_bytes: int) -> None:
        """fd: DevicePool.descriptor, taken over. size: DevicePool.size. Raises OSError."""
        try:
            if size < num_bytes:
                raise OSError(f"the pool's memory has {size} bytes, not {num_bytes}")
            address = driver.map_descriptor(fd, size, writes=True)
        finally:
            os.close(fd)
        self._driver = driver
        self._told = driver.create_event()
        self.tensor: Tensor = driver.tensor(address, num_bytes)

    def mark(self) -> int:
        """0: the leading rank says that a step is done once every rank's is, by `settle`."""
        return 0

    def settle(self) -> None:
        """This thread waits until the device has computed what this process told it."""
        self._driver.record(self._told, COMPUTE)
        self._driver.synchronize(self._told)
