import errno
import fcntl
import mmap
import os
import subprocess
import sys

import pytest
import torch

from shared.transport.pool_memory import MappedMemory, PoolMemory

PAGE = mmap.PAGESIZE


@pytest.fixture
def memory():
    memory = PoolMemory(4 * PAGE)
    yield memory
    memory.close()


def test_is_zeroed_writable_and_of_its_size(memory):
    assert bytes(memory.buffer) == bytes(4 * PAGE)
    memory.buffer[-1] = 7
    assert memory.buffer[4 * PAGE - 1] == 7


def test_readers_see_what_is_written(memory):
    fd = memory.read_only_fd()
    with mmap.mmap(fd, memory.num_bytes, prot=mmap.PROT_READ) as view:
        memory.buffer[10:13] = b"abc"
        assert view[10:13] == b"abc"
    os.close(fd)


def test_a_reader_can_neither_write_nor_map_for_writing_nor_resize(memory):
    fd = memory.read_only_fd()
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, memory.num_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for attempt in (lambda: os.write(fd, b"x"), lambda: os.ftruncate(fd, PAGE)):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                attempt()
            assert caught.value.errno in (errno.EBADF, errno.EINVAL, errno.EPERM)
    finally:
        os.close(fd)


def test_reopening_the_descriptor_for_writing_gains_nothing(memory):
    """The same user may reopen it through /proc: then the seal stands in the way."""
    fd = memory.read_only_fd()
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(writable, memory.num_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for attempt in (
            lambda: os.pwrite(writable, b"x", 0),
            lambda: os.ftruncate(writable, PAGE),
            lambda: os.ftruncate(writable, 8 * PAGE),
            lambda: fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                attempt()
    finally:
        os.close(writable)
        os.close(fd)
    memory.buffer[0] = 1  # its owner still writes


def test_writing_through_the_address_ends_the_writer(memory):
    fd = memory.read_only_fd()
    code = f"""
import ctypes, mmap, numpy
view = mmap.mmap({fd}, {memory.num_bytes}, prot=mmap.PROT_READ)
ctypes.memset(numpy.frombuffer(view, numpy.uint8).ctypes.data, 1, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[fd], check=False)
    os.close(fd)
    assert done.returncode == -11
    assert bytes(memory.buffer) == bytes(4 * PAGE)


def test_close_gives_descriptors_back_and_leaves_tensors_in_place(held):
    before = held()
    memory = PoolMemory(PAGE)
    tensor = torch.frombuffer(memory.buffer, dtype=torch.float32)
    tensor.fill_(3.0)
    memory.close()
    memory.close()
    assert tensor.sum() == 3.0 * PAGE / 4
    with pytest.raises(ValueError, match="closed"):
        _ = memory.buffer
    with pytest.raises(ValueError, match="closed"):
        memory.read_only_fd()
    del tensor
    assert held()[0] <= before[0]
    assert held()[1] == before[1]


def test_ranks_map_it_for_writing_before_it_is_sealed_and_nobody_after(held):
    before = held()
    memory = PoolMemory(PAGE, is_sealed=False)
    with pytest.raises(OSError, match=f"has {PAGE} bytes, not {2 * PAGE}"):
        MappedMemory(os.dup(memory.descriptor), 2 * PAGE)
    rank = MappedMemory(os.dup(memory.descriptor), PAGE)
    memory.seal()
    with pytest.raises(PermissionError):
        MappedMemory(os.dup(memory.descriptor), PAGE)
    rank.tensor[3] = 7
    memory.tensor[4] = 8
    assert (memory.buffer[3], int(rank.tensor[4]), rank.mark()) == (7, 8, 0)
    with pytest.raises(OSError):  # noqa: PT011
        os.ftruncate(memory.descriptor, 2 * PAGE)
    memory.close()
    del rank
    assert held() == before


def test_refuses_an_empty_pool():
    with pytest.raises(ValueError, match="num_bytes"):
        PoolMemory(0)
