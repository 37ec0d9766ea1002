"""The workers of a host share its cores.

    cores = Cores.join()
    with cores.computing():        # while another worker computes too, each has its part of the threads
        run_step(...)
    cores.prompts = 3              # a prefill worker: prompts that it has still to compute
    pause_s = cores.pause_s(step_s, 8)  # a decode worker: how long to leave the cores to the prompts of others

Alone, a worker uses every core. Two that compute at once on all cores each hold up the other's threads in the middle of
an op, so each takes its part of them from the next op on, and a helper thread stops between two chunks
(kernels/cpu/team.c). What each worker does stands on a board, a page of memory that the workers of one user on the same
set of cores map from a file in the temporary folder. A worker that was killed is wiped off by the next to look, so only
those that can see each other's processes are on one board: containers that share that folder have one each.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kernels.cpu import library

log = logging.getLogger(__name__)

SLOTS = 64  # workers on one board
_LOOK_S = 1.0  # how often the dead are looked for

_mapped: list[ctypes.Structure] = []  # helper threads read them as long as the process lives


class _Board(ctypes.Structure):
    """One column for each slot; all zero = free."""

    _fields_ = (
        ("pid", ctypes.c_int32 * SLOTS),
        ("started", ctypes.c_int32 * SLOTS),  # a pid may be given out again, and with another start
        ("computing", ctypes.c_int32 * SLOTS),
        ("prompts", ctypes.c_int32 * SLOTS),
    )


class Cores:
    """One worker's place on the board. `Cores()` is on a board of its own: it shares with nobody."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        """memory: a board, locked. Raises OSError if it is full."""
        self._path: Path | None = None
        self._memory = memory if memory is not None else mmap.mmap(-1, mmap.PAGESIZE)
        self._board = _Board.from_buffer(self._memory)
        self._looked_s = time.monotonic()
        self._wipe()
        free = [slot for slot in range(SLOTS) if not self._board.pid[slot]]
        if not free:
            raise OSError(f"{SLOTS} workers share these cores already")
        self._slot = free[0]
        self._board.started[self._slot] = _started(os.getpid())
        self._board.pid[self._slot] = os.getpid()

    @classmethod
    def join(cls, folder: Path | None = None) -> Cores:
        """The board of this user's workers on these cores; one of its own, and a warning, where that cannot be had.

        folder: where its file lies; default: a private one in the temporary folder.
        """
        try:
            cores = cls.open(folder)
        except OSError as error:
            log.warning("the cores are not shared with other workers of this host: %s", error)
            cores = cls()
        _mapped.append(cores._board)
        address = ctypes.addressof(cores._board) + _Board.computing.offset
        library.call("tandem_share_cores", address, SLOTS, len(os.sched_getaffinity(0)))
        return cores

    @classmethod
    def open(cls, folder: Path | None = None) -> Cores:
        """A place on that board, of which the ops are not told. Raises OSError where it cannot be had."""
        try:
            return cls._open(folder)
        except FileNotFoundError:  # the last to leave has just removed it
            return cls._open(folder)

    @classmethod
    def _open(cls, folder: Path | None) -> Cores:
        shared = repr((sorted(os.sched_getaffinity(0)), os.readlink("/proc/self/ns/pid"))).encode()
        path = (folder or _private_folder()) / f"cores-{hashlib.sha256(shared).hexdigest()[:16]}"
        with _locked(path) as file:
            cores = cls(mmap.mmap(file, mmap.PAGESIZE))
        cores._path = path
        return cores

    @property
    def prompts(self) -> int:
        """Prompts that this worker has still to compute."""
        return self._board.prompts[self._slot]

    @prompts.setter
    def prompts(self, count: int) -> None:
        self._board.prompts[self._slot] = count

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Others leave this worker its part of the cores meanwhile."""
        if time.monotonic() > self._looked_s + _LOOK_S:
            self._looked_s = time.monotonic()
            self._wipe()
        self._board.computing[self._slot] = 1
        try:
            yield
        finally:
            self._board.computing[self._slot] = 0

    def pause_s(self, step_s: float, streams: int, max_s: float) -> float:
        """How long the cores are others' after a step of so many streams, at most `max_s`.

        Four times the step for as many prompts as streams, more for more, so that a few streams do not hold up the many
        that wait to become part of their batch; with the cube of prompts / streams while the prompts are fewer.
        """
        ratio = (sum(self._board.prompts) - self.prompts) / streams
        return min(4 * step_s * ratio * min(ratio, 1.0) ** 2, max_s)

    def leave(self) -> None:
        """Gives the place up; the last to leave removes the file."""
        self._clear(self._slot)
        if self._path is None:
            return
        with contextlib.suppress(OSError), _locked(self._path):
            self._wipe()
            if not any(self._board.pid):
                self._path.unlink()
                self._path.parent.rmdir()

    def _wipe(self) -> None:
        for slot in range(SLOTS):
            pid = self._board.pid[slot]
            if pid and _started(pid) != self._board.started[slot]:
                self._clear(slot)

    def _clear(self, slot: int) -> None:
        for column in (self._board.computing, self._board.prompts, self._board.started, self._board.pid):
            column[slot] = 0


def _started(pid: int) -> int:
    """When a process was started, in ticks, as far as 31 bits tell; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    state, ticks = fields[0], int(fields[19])
    return 0 if state in "ZX" else ticks & 0x7FFFFFFF or 1


def _private_folder() -> Path:
    """Ours alone: what others could write must not slow us down."""
    folder = Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} must be a folder that only its owner can write to")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The board's file, of one page; one process at a time."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_ino != os.fstat(file).st_ino:
            raise FileNotFoundError(f"{path} was removed meanwhile")
        os.ftruncate(file, mmap.PAGESIZE)
        yield file
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a mapping keeps the file open
        os.close(file)
