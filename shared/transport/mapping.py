"""Another process's pool, mapped here for reading only."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np

from shared.transport.descriptor_socket import receive_descriptor


class Mapping:
    """num_bytes of a peer's memory. It outlives the peer: the pages stay until `close`.

    address: of the first byte, valid until `close`; nothing may be written there (the pages are PROT_READ).
    """

    def __init__(self, path: str, epoch: int, num_bytes: int) -> None:
        """Takes the descriptor from the peer's socket and maps it. Blocks; raises OSError saying what is in the way."""
        fd, self._connection = receive_descriptor(path, epoch, num_bytes)
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            if (size := os.fstat(fd).st_size) != num_bytes:
                raise OSError(f"{path} passed a file of {size} bytes instead of {num_bytes}")
            if not _seals(fd) & fcntl.F_SEAL_SHRINK:
                # its owner could cut it under a running copy, which ends this process by SIGBUS
                raise OSError(f"{path} passed memory that is not sealed against shrinking")
            # the pages exist already, so populating only fills this process's page table, and no copy takes faults
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._map = mmap.mmap(fd, num_bytes, flags=flags, prot=mmap.PROT_READ)
        except BaseException:
            self._connection.close()
            raise
        finally:
            os.close(fd)
        self.num_bytes = num_bytes
        self._bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self.address = self._bytes.ctypes.data

    def watch(self, on_death: Callable[[], None]) -> None:
        """Calls back once, on the running event loop, when the owner of the pool is gone."""
        self._loop = asyncio.get_running_loop()

        def notice() -> None:
            self._unwatch()
            on_death()

        self._loop.add_reader(self._connection, notice)

    def close(self) -> None:
        """Unmaps. The caller sees to it that no copy is running."""
        self._unwatch()
        self._connection.close()
        self._bytes = None  # the array would keep the map open
        self._map.close()

    def _unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._connection)
            self._loop = None


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0  # no memory file
