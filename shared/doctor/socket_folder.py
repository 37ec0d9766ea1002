"""The folder of unix sockets through which workers map each other's pools, tried with a handoff."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.config import TandemConfig
from shared.doctor.finding import Finding, fault, ok, warning
from shared.doctor.surroundings import Surroundings
from shared.transport.descriptor_socket import LONGEST_PATH, DescriptorServer, attach
from shared.transport.pool_memory import PoolMemory

CHECK = "socket folder"
_NAME_BYTES = len("/0123456789abcdef.cuda.sock.new")  # the longest that a worker makes in it
_MARK = b"tandem doctor"
# Of the folder itself; None: it is not this user's own. EPERM is a file system's that knows no sockets.
_FOLDER_ERRORS = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, None)
_LOOPBACK = ("127.", "localhost:", "[::1]:")


def folder_of(config: TandemConfig) -> Path:
    """The configured one, else the private one of this user. FileNotFoundError without a temporary folder."""
    return config.transport.socket_dir or Path(tempfile.gettempdir()) / f"tandem-{os.geteuid()}"


def socket_folder(surroundings: Surroundings) -> Iterator[Finding]:
    config = surroundings.config
    severe = config.transport.require not in (None, "inline")
    wanted = {"shared_memory", "cuda_ipc"} if surroundings.may_use_gpu else {"shared_memory"}
    if wanted <= set(config.transport.disable):
        yield ok(CHECK, f"not needed: transport.disable names {' and '.join(sorted(wanted))}")
        return
    try:
        folder = folder_of(config)
    except FileNotFoundError as refused:
        text = f"there is no temporary folder to have it in, so KV blocks go over gRPC: {refused.strerror}"
        yield fault(severe, CHECK, "socket folder unusable", text, uid=os.geteuid(), folder="/run/tandem")
        return
    if (length := len(os.fsencode(folder)) + _NAME_BYTES) > LONGEST_PATH:
        text = f"{folder}: a socket's path there has {length} bytes, and the kernel takes {LONGEST_PATH}"
        yield fault(severe, CHECK, "socket path too long", f"{text}; KV blocks go over gRPC instead")
        return
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        asyncio.run(_hand_over(config.transport.socket_dir))
    except OSError as refused:
        text = f"a pool cannot be handed over through {folder}, so KV blocks go over gRPC: {refused}"
        if refused.errno in _FOLDER_ERRORS:
            yield fault(severe, CHECK, "socket folder unusable", text, uid=os.geteuid(), folder=folder)
        else:
            yield fault(severe, CHECK, "no handoff", text)
        return
    finally:
        for path in missing:  # looking leaves nothing
            with contextlib.suppress(OSError):
                path.rmdir()
    mode = folder.stat().st_mode if folder.is_dir() else 0
    if mode & 0o022 and not mode & stat.S_ISVTX:  # in a sticky folder each removes but his own
        text = f"{folder} can be written to by others, who can remove the workers' sockets"
        yield warning(CHECK, "socket folder open to others", text, folder=folder)
    if surroundings.in_container and _has_remote_workers(config) and _is_of_the_container(surroundings, folder):
        text = (
            f"{folder} is this container's own, and gateway.prefill_workers or gateway.decode_workers name workers "
            "elsewhere: those in other containers cannot map a pool through it"
        )
        yield warning(CHECK, "socket folder not shared", text)
    yield ok(CHECK, f"a memory file was handed over through {folder} and mapped")


async def _hand_over(folder: Path | None) -> None:
    """What two workers do: one listens and passes a memory file, the other connects and maps it."""
    memory = PoolMemory(mmap.PAGESIZE)
    try:
        memory.buffer[: len(_MARK)] = _MARK
        epoch = secrets.randbits(63)
        server = DescriptorServer(memory.read_only_fd(), epoch, memory.num_bytes, folder)
        try:
            seen = await asyncio.to_thread(_read, str(server.path), epoch, memory.num_bytes)
            if seen != _MARK:
                raise OSError("other bytes were mapped than were written")
        finally:
            server.close()
    finally:
        memory.close()


def _read(path: str, epoch: int, num_bytes: int) -> bytes:
    """The first bytes of what is passed there, mapped as mapping.py does, which loads torch."""
    fd, lifeline = attach(path, epoch, num_bytes)
    try:
        if fd is None:
            raise OSError(f"{path} passed no descriptor")
        try:
            with mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ) as memory:
                return memory[: len(_MARK)]
        finally:
            os.close(fd)
    finally:
        lifeline.close()


def _has_remote_workers(config: TandemConfig) -> bool:
    targets = (*config.gateway.prefill_workers, *config.gateway.decode_workers)
    return any(not target.startswith(_LOOPBACK) for target in targets)


def _is_of_the_container(surroundings: Surroundings, folder: Path) -> bool:
    """Whether it lies on the container's own file system, not on a volume."""
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return surroundings.config.transport.socket_dir is None or place.stat().st_dev == surroundings.root.stat().st_dev
