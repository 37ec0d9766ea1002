"""Another process's pool on a CUDA device, mapped here."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from tandem.v1 import kv_pb2
from torch import Tensor

from shared.rpc import unavailable
from shared.transport.cuda import HANDLE_BYTES, CudaDriver, CudaError
from shared.transport.descriptor_socket import attach

log = logging.getLogger(__name__)

MAX_EVENTS = 64
LOOK_S = 1e-4  # between two looks at a peer's event


class DeviceMapping:
    """The first num_bytes of a peer's device memory, for devices of this process to read, until `close`."""

    def __init__(self, drivers: Sequence[CudaDriver], handle: kv_pb2.CudaIpcHandle, epoch: int, num_bytes: int) -> None:
        """drivers: of the devices that read it. Blocks. Raises OSError saying what is in the way."""
        _check(handle, num_bytes)
        for driver in drivers:
            driver.reach(handle.device_uuid)
        fd, self._lifeline = attach(handle.socket_path, epoch, handle.num_bytes)
        self._driver = drivers[0]
        self._gone = threading.Event()
        self._opened = bool(handle.handle)  # else mapped by its descriptor
        self._mapped: list[tuple[CudaDriver, int, int]] = []  # where, and of what size
        self._tensors: dict[str, Tensor] = {}
        self._events: list[int] = []
        try:
            for driver in drivers:
                if driver.uuid not in self._tensors:
                    self._tensors[driver.uuid] = driver.tensor(self._map(driver, handle, fd, num_bytes), num_bytes)
            self._open_events(list(handle.event_handles))
        except BaseException:
            self.close()
            raise
        finally:
            if fd is not None:
                os.close(fd)

    def on(self, driver: CudaDriver) -> Tensor:
        """uint8 [num_bytes] as one of the devices reads it."""
        return self._tensors[driver.uuid]

    @property
    def tensor(self) -> Tensor:
        """As the first of the devices reads it."""
        return self.on(self._driver)

    @property
    def waits(self) -> bool:
        """Whether this process sees the peer's marks; else the peer has to be asked."""
        return bool(self._events)

    def settle(self, mark: int, stop: threading.Event) -> bool:
        """This thread waits for a mark of the peer, if it `waits`. False: `stop` was set before.

        A stream does not: it would wait for ever for what a peer that was killed had yet to compute, and all that is
        copied after it. Raises UNAVAILABLE once the owner of the pool is known to be gone.
        """
        while mark and self._events and not self._driver.done(self._events[mark % len(self._events)]):
            if stop.is_set():
                return False
            if self._gone.is_set():
                raise unavailable("the prefill worker is gone, and had not written the blocks")
            time.sleep(LOOK_S)
        return True

    def watch(self, on_death: Callable[[], None]) -> None:
        """Calls back once, on the running event loop, when the owner of the pool is gone."""

        def notice() -> None:
            self._gone.set()
            on_death()

        self._lifeline.watch(notice)

    def close(self) -> None:
        """Unmaps. The caller sees to it that no copy is running."""
        self._lifeline.close()
        for event in self._events:
            self._driver.destroy_event(event)
        self._events.clear()
        while self._mapped:
            driver, address, size = self._mapped.pop()
            if self._opened:
                driver.close_handle(address)
            else:
                driver.unmap(address, size)

    def _map(self, driver: CudaDriver, handle: kv_pb2.CudaIpcHandle, fd: int | None, num_bytes: int) -> int:
        """Where the memory is, as the device has it now."""
        size = handle.num_bytes
        if self._opened:
            address, size = driver.open_handle(handle.handle)
        elif fd is not None:
            address = driver.map_descriptor(fd, size)
        else:
            raise OSError(f"{handle.socket_path} passed no descriptor")
        self._mapped.append((driver, address, size))
        if size < num_bytes:
            raise OSError(f"the handle is one of {size} bytes, not of {num_bytes}")
        return address

    def _open_events(self, handles: list[bytes]) -> None:
        try:
            for handle in handles:
                self._events.append(self._driver.open_event(handle))
        except CudaError as error:
            # events need more in common than a descriptor does
            for event in self._events:
                self._driver.destroy_event(event)
            self._events.clear()
            log.info("each import asks the prefill worker whether its blocks are written: %s", error)


def _check(handle: kv_pb2.CudaIpcHandle, num_bytes: int) -> None:
    if handle.num_bytes < num_bytes:
        raise OSError(f"an allocation of {handle.num_bytes} bytes does not hold a pool of {num_bytes}")
    if len(handle.event_handles) > MAX_EVENTS:
        raise OSError(f"{len(handle.event_handles)} events are more than {MAX_EVENTS}")
    for data in (*([handle.handle] if handle.handle else ()), *handle.event_handles):
        if len(data) != HANDLE_BYTES:
            raise OSError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, not {len(data)}")
