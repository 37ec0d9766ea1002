"""The memory of a KV pool: a memory file that other processes can map, but never write.

    memory = PoolMemory(num_blocks * layout.block_bytes)
    kv = KvCache(layout, num_blocks, memory=memory.tensor)

It has no name in any file system, needs no /dev/shm, and the kernel frees it with its last user, however that one dies.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Linux 5.1: no new writable mapping and no write() by anyone; our own mapping stays writable. Not in Python's fcntl.
F_SEAL_FUTURE_WRITE = 0x0010
# Linux 6.3, and compulsory where vm.memfd_noexec is 2. Not in Python's os.
MFD_NOEXEC_SEAL = 0x0008


class PoolMemory:
    """num_bytes of zeroed shared memory, mapped here for reading and writing.

    populate: touch every page now, which is quicker than at first use and fails at start when memory is short.
    Its size is sealed, so that a reader can never meet SIGBUS, and so is writing from outside. is_sealed: False leaves
    writing open until `seal`, for the processes that compute into it: they map it by `descriptor` before.
    """

    def __init__(self, num_bytes: int, *, populate: bool = True, is_sealed: bool = True) -> None:
        if num_bytes < 1:
            raise ValueError(f"num_bytes: {num_bytes} is not positive")
        self.num_bytes = num_bytes
        self._fd = _create("tandem-kv")
        try:
            os.ftruncate(self._fd, num_bytes)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
            self._map: mmap.mmap | None = mmap.mmap(self._fd, num_bytes, flags=flags)
            if is_sealed:
                self.seal()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def descriptor(self) -> int:
        """Of the memory file, which stays this object's; it can be mapped for writing until `seal`."""
        return self._fd

    def seal(self) -> None:
        """From now on nobody can map it for writing. Mappings that there are stay writable."""
        _seal(self._fd)

    @property
    def buffer(self) -> memoryview:
        """The bytes, writable."""
        if self._map is None:
            raise ValueError("the pool's memory is closed")
        return memoryview(self._map)

    @property
    def tensor(self) -> Tensor:
        """The bytes as uint8 [num_bytes]."""
        import torch  # `tandem doctor` makes such memory too, and loads no torch

        return torch.frombuffer(self.buffer, dtype=torch.uint8)

    def mark(self) -> int:
        """0: what a CPU was told to compute is done."""
        return 0

    def read_only_fd(self) -> int:
        """A new descriptor that can be mapped for reading only; the caller closes it."""
        if self._map is None:
            raise ValueError("the pool's memory is closed")
        # a dup would share the access mode of the original
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Gives the memory up. It is unmapped once the last buffer and tensor over it is gone: torch.frombuffer
        keeps no lock on a buffer, so unmapping at once would leave its tensor pointing nowhere."""
        if self._map is not None:
            self._map = None
            os.close(self._fd)


class MappedMemory:
    """The memory of a pool as a rank of the same worker sees it, mapped for reading and writing."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """fd: PoolMemory.descriptor of memory that is not sealed yet, taken over. Raises OSError."""
        try:
            if (size := os.fstat(fd).st_size) != num_bytes:
                raise OSError(f"the pool's memory has {size} bytes, not {num_bytes}")
            self._map = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)

    @property
    def tensor(self) -> Tensor:
        """The bytes as uint8 [num_bytes]."""
        import torch

        return torch.frombuffer(memoryview(self._map), dtype=torch.uint8)

    def mark(self) -> int:
        """0: what a CPU was told to compute is done."""
        return 0

    def settle(self) -> None:
        """Nothing is left to wait for, as `mark` says."""


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def _seal(fd: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # an old kernel: then only the descriptor's access mode keeps peers from writing
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
