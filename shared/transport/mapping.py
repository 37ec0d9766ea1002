"""Another process's pool in host memory, mapped here for reading only."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np
import torch

from shared.transport.descriptor_socket import attach


class Mapping:
    """num_bytes of a peer's memory. It outlives the peer: the pages stay until `close`.

    tensor: uint8 [num_bytes], valid until `close`; nothing may be written there (the pages are PROT_READ).
    staged: the pool itself is on a device, and a block is here only once the peer was asked to put it here.
    """

    def __init__(self, path: str, epoch: int, num_bytes: int, *, staged: bool = False) -> None:
        """Takes the descriptor from the peer's socket and maps it. Blocks; raises OSError saying what is in the way."""
        fd, self._lifeline = attach(path, epoch, num_bytes)
        try:
            if fd is None:
                raise OSError(f"{path} passed no descriptor")
            if (size := os.fstat(fd).st_size) != num_bytes:
                raise OSError(f"{path} passed a file of {size} bytes instead of {num_bytes}")
            if not _seals(fd) & fcntl.F_SEAL_SHRINK:
                # its owner could cut it under a running copy, which ends this process by SIGBUS
                raise OSError(f"{path} passed memory that is not sealed against shrinking")
            # the pages exist already, so populating only fills this process's page table, and no copy takes faults
            flags = mmap.MAP_SHARED | (0 if staged else mmap.MAP_POPULATE)
            self._map = mmap.mmap(fd, num_bytes, flags=flags, prot=mmap.PROT_READ)
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            if fd is not None:
                os.close(fd)
        self.staged = staged
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        # by address: torch would warn of every buffer that it may not write to
        buffer = (ctypes.c_ubyte * num_bytes).from_address(self._bytes.ctypes.data)
        self.tensor = torch.frombuffer(buffer, dtype=torch.uint8)

    def watch(self, on_death: Callable[[], None]) -> None:
        """Calls back once, on the running event loop, when the owner of the pool is gone."""
        self._lifeline.watch(on_death)

    def close(self) -> None:
        """Unmaps. The caller sees to it that no copy is running."""
        self._lifeline.close()
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._bytes = np.empty(0, dtype=np.uint8)  # the array would keep the map open
        self._map.close()


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0  # no memory file
