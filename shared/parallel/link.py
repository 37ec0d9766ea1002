"""The socket between a worker's leading rank and one of the others: messages of a kind and bytes, of a bounded size.

    header   kind (1 byte), length of the body (4 bytes, big-endian)
    body     START: JSON (follower.py). FORWARD: entries (entries.py). FAILED: why, as text. Of the others nothing.

The leading rank says START, JOIN, WARM_UP, FORWARD and STOP, one at a time. The other answers each but the last with
DONE, START with two: once it has mapped its pool, and once it has loaded. Or with FAILED, and ends. Free of torch.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

MAX_BYTES = 64 << 20  # far above the entries of a step
_HEADER = struct.Struct("!BI")


class Kind(IntEnum):
    """START: what to load. JOIN: the process group. WARM_UP and FORWARD: the engine's. STOP: end, with status 0."""

    START = 1
    JOIN = 2
    WARM_UP = 3
    FORWARD = 4
    STOP = 5
    DONE = 6
    FAILED = 7


def rendezvous(meeting: int) -> str:
    """The address of a process group that meets in a file, by its descriptor in this process."""
    return f"file:///proc/self/fd/{meeting}"


class Link:
    """One end. One thread at a time. EOFError once the other end is closed, ValueError for what is no message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """ValueError for a body above MAX_BYTES."""
        if len(body) > MAX_BYTES:
            raise ValueError(f"a message of {len(body)} bytes is longer than {MAX_BYTES}")
        try:
            self._connection.sendall(_HEADER.pack(kind, len(body)) + body)
        except OSError as error:  # nobody reads any more
            raise EOFError(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> tuple[Kind, bytes]:
        """Waits for a message; TimeoutError if it does not begin, or goes on, in time."""
        self._connection.settimeout(timeout_s)
        number, length = _HEADER.unpack(self._read(_HEADER.size))
        if length > MAX_BYTES:
            raise ValueError(f"a message of {length} bytes is longer than {MAX_BYTES}")
        return Kind(number), self._read(length)

    def close(self) -> None:
        self._connection.close()

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        view, filled = memoryview(data), 0
        while filled < length:
            try:
                count = self._connection.recv_into(view[filled:])
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            if not count:
                raise EOFError("the other end is closed")
            filled += count
        return bytes(data)
