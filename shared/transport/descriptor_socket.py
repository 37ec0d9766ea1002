"""Passes the descriptor of a pool's memory to other processes of the same user, over a unix socket.

A client connects and gets one message: a header with the pool's epoch and size, and the descriptor, unless the memory
is reached by other means. Then nothing more is said; the connection stays, so that each side learns from the kernel
when the other one is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

HEADER = struct.Struct("!8sQQ")  # magic, epoch, bytes of the pool
MAGIC = b"TANDEMKV"
PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
MAX_CONNECTIONS = 1024
CONNECT_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.5
LONGEST_PATH = 107  # bytes of sockaddr_un.sun_path, less its terminating zero


class DescriptorServer:
    """Listens in a folder until closed. Lives on the event loop that runs when it is made.

    fd: what to pass, if anything, taken over and closed with the server. folder: None = one of this user's own below
    the temporary folder. suffix: tells apart the sockets of one pool. Raises OSError saying why no socket can be had.
    """

    def __init__(
        self, fd: int | None, epoch: int, num_bytes: int, folder: Path | None = None, *, suffix: str = ""
    ) -> None:
        self._fds = [] if fd is None else [fd]
        self._closed = False
        self._header = HEADER.pack(MAGIC, epoch, num_bytes)
        self._connections: set[socket.socket] = set()
        self._idle: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        self._own_folder = folder is None
        self._pause: asyncio.TimerHandle | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.path = _bind(self._listener, folder, f"{epoch:016x}{suffix}.sock")
        except BaseException:
            self._listener.close()
            self._close_fds()
            raise
        self._listen()

    def close(self) -> None:
        """Stops listening, removes the socket and ends every connection."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._listener)
        if self._pause:
            self._pause.cancel()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self._own_folder:
            with contextlib.suppress(OSError):  # other workers still use it
                self.path.parent.rmdir()
        for connection in list(self._connections):
            self._end(connection)
        self._close_fds()

    async def release(self, timeout_s: float) -> bool:
        """Tells every client that the pool is about to go, and waits until they have let go of it; False: not all."""
        self._loop.remove_reader(self._listener)
        for connection in self._connections:
            connection.shutdown(socket.SHUT_WR)
        self._idle = asyncio.Event()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        return not self._connections

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone again
        except OSError:
            # no descriptor left in this process: the client waits, and this loop must not spin on it
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        try:
            if peer_uid(connection) != os.geteuid() or len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                return
            connection.setblocking(False)
            # far below the size of a new connection's send buffer, so it never blocks or splits
            socket.send_fds(connection, [self._header], self._fds)
        except OSError:
            connection.close()
            return
        self._connections.add(connection)
        self._loop.add_reader(connection, self._end, connection)  # a client never writes: readable = gone

    def _end(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._connections.discard(connection)
        connection.close()
        if self._idle is not None and not self._connections:
            self._idle.set()


class Lifeline:
    """A client's connection to a pool's socket, which turns readable when the owner of the pool is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, on_death: Callable[[], None]) -> None:
        """Calls back once, on the running event loop, when the owner of the pool is gone."""
        self._loop = asyncio.get_running_loop()

        def notice() -> None:
            self._unwatch()
            on_death()

        self._loop.add_reader(self._connection, notice)

    def close(self) -> None:
        self._unwatch()
        self._connection.close()

    def _unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._connection)
            self._loop = None


def attach(path: str, epoch: int, num_bytes: int) -> tuple[int | None, Lifeline]:
    """Connects and takes the descriptor, if one is passed. Blocks for CONNECT_TIMEOUT_S at most.

    Raises OSError saying what is in the way: no such socket, another user, another epoch or size.
    """
    if len(os.fsencode(path)) > LONGEST_PATH or "\0" in path:
        raise OSError(f"{path[:LONGEST_PATH]!r} is no path of a unix socket")
    fds: list[int] = []
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(path)
        if (uid := peer_uid(connection)) != os.geteuid():
            raise OSError(f"{path} belongs to user {uid}, not to user {os.geteuid()}; run both workers as one user")
        header, fds, _, _ = socket.recv_fds(connection, HEADER.size, 1, socket.MSG_CMSG_CLOEXEC)
        if len(header) != HEADER.size:
            raise OSError(f"{path} passed no descriptor (another user's worker, or too many connections)")
        if header != HEADER.pack(MAGIC, epoch, num_bytes):
            raise OSError(f"{path} passed another pool than the one of epoch {epoch} with {num_bytes} bytes")
        connection.setblocking(False)
        return (fds.pop() if fds else None), Lifeline(connection)
    except BaseException as error:
        connection.close()
        for fd in fds:
            os.close(fd)
        if isinstance(error, FileNotFoundError):
            remedy = "workers that do not see the same files, as in containers, must share transport.socket_dir"
            raise OSError(f"{path}: {error.strerror}; {remedy}") from error
        if isinstance(error, OSError) and path not in str(error):
            raise OSError(f"{path}: {error.strerror or error}") from error
        raise


def peer_uid(connection: socket.socket) -> int:
    """The user on the other end, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    return PEER_CREDENTIALS.unpack(credentials)[1]


def _bind(listener: socket.socket, folder: Path | None, name: str) -> Path:
    """Listens at folder/name, once the sockets that killed workers left in the folder are removed."""
    place = folder or Path(tempfile.gettempdir()) / f"tandem-{os.geteuid()}"
    path = place / name
    unready = place / f"{name}.new"  # while it does not listen yet, another worker would take it for a left one
    if len(os.fsencode(unready)) > LONGEST_PATH:
        raise OSError(f"{path}: a unix socket's path has {LONGEST_PATH} bytes; set a shorter transport.socket_dir")
    for attempt in range(3):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder is None:
                _check_private(place)
            _sweep(place)
            listener.bind(os.fspath(unready))
            break
        except FileNotFoundError:  # removed by a worker that stopped just now
            if attempt == 2:
                raise
    listener.listen(MAX_CONNECTIONS)
    unready.rename(path)
    return path


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(f"{folder} is not a private folder of user {os.geteuid()}; remove it or set transport.socket_dir")


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue
