"""The processes of a worker's ranks but the leading one, which is the worker's own and their parent.

    followers = Followers.start({"config": ..., "role": "decode"}, memories)   # of the pools of ranks 1 and so on
    followers.expect()                                  # each has done what it was told, or GroupError with its words
    followers.tell(Kind.FORWARD, encode_entries(entries))
    followers.stop()

They serve nobody else: they know a socket to the leading rank, the memory of their pool and the process group. Each
gets SIGKILL from the kernel when the leading rank ends, however that comes; SIGTERM and SIGINT, which a service manager
or a terminal sends to all processes of a worker, are the leading rank's to obey.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from shared.parallel.group import GroupError
from shared.parallel.link import Kind, Link, rendezvous

log = logging.getLogger(__name__)

STOP_S = 10.0
_ROOT = Path(__file__).resolve().parents[2]


class RankMemory(NamedTuple):
    """What a rank's pool lies in: a descriptor of this process, and the bytes to map."""

    descriptor: int
    num_bytes: int


class Follower:
    """A rank's process, and the socket to it."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], link: Link) -> None:
        self.rank, self.process, self.link = rank, process, link

    def ended(self) -> GroupError:
        """What to say of a process that has ended, or is about to."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        status = self.process.returncode
        how = "is there and says nothing" if status is None else f"ended with {_described(status)}"
        return GroupError(f"rank {self.rank} {how}")


class Followers:
    """One thread at a time, but for `kill`."""

    def __init__(self, followers: Sequence[Follower], meeting: int) -> None:
        self._followers = tuple(followers)
        self._meeting = meeting
        self._watched: dict[int, asyncio.AbstractEventLoop] = {}

    @classmethod
    def start(cls, settings: Mapping[str, Any], memories: Sequence[RankMemory]) -> Followers:
        """Starts a process for each rank from 1 on, which begins to load.

        settings: what each is told beside its rank, as JSON can say it. memories: of their pools.
        The thread that calls has to live as long as they do: the kernel takes its end for that of the parent.
        """
        # where the ranks meet: a file without a name, which is gone with its last user
        meeting = os.memfd_create("tandem-ranks", os.MFD_CLOEXEC)
        followers: list[Follower] = []
        try:
            for rank, memory in enumerate(memories, 1):
                followers.append(_start(rank, memory.descriptor, meeting))
                told = {**settings, "rank": rank, "size": len(memories) + 1, "memory": memory, "meeting": meeting}
                followers[-1].link.send(Kind.START, json.dumps(told).encode())
        except BaseException:
            cls(followers, meeting).stop(orderly=False)
            raise
        return cls(followers, meeting)

    @property
    def rendezvous(self) -> str:
        """Where the ranks' process group meets, for each of these processes and this one."""
        return rendezvous(self._meeting)

    def tell(self, kind: Kind, body: bytes = b"") -> None:
        """Tells every rank what to do next. Raises GroupError if one is gone."""
        for follower in self._followers:
            try:
                follower.link.send(kind, body)
            except EOFError:
                raise _failure(follower) from None

    def expect(self, timeout_s: float | None = None) -> None:
        """Waits until every rank has done what it was told. Raises GroupError with the words of one that has not."""
        for follower in self._followers:
            try:
                kind, body = follower.link.receive(timeout_s)
            except (EOFError, ValueError):
                raise _failure(follower) from None
            except TimeoutError:
                raise GroupError(f"rank {follower.rank} did not answer in {timeout_s:g} s") from None
            if kind is not Kind.DONE:
                raise GroupError(f"rank {follower.rank}: {body.decode(errors='replace')}")

    def watch(self, on_end: Callable[[GroupError], None]) -> None:
        """Calls back on the running event loop when a process ends that was not told to."""
        loop = asyncio.get_running_loop()
        for follower in self._followers:
            fd = os.pidfd_open(follower.process.pid)
            self._watched[fd] = loop

            def notice(fd: int = fd, follower: Follower = follower) -> None:
                self._unwatch(fd)
                on_end(follower.ended())

            loop.add_reader(fd, notice)

    def kill(self) -> None:
        """SIGKILL to every process: whoever waits for them in a collective gets an error. `stop` has to follow."""
        for follower in self._followers:
            follower.process.kill()

    def unwatch(self) -> None:
        """From now on an end is no news. On the event loop."""
        for fd in list(self._watched):
            self._unwatch(fd)

    def stop(self, *, orderly: bool = True) -> None:
        """Ends every process, by its own hand if `orderly`, and waits for the ends."""
        for follower in self._followers:
            if orderly:
                with suppress(EOFError):
                    follower.link.send(Kind.STOP)
            else:
                follower.process.kill()
        for follower in self._followers:
            try:
                follower.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
            if orderly and follower.process.returncode:
                log.warning("rank %d ended with %s", follower.rank, _described(follower.process.returncode))
            follower.link.close()
        os.close(self._meeting)

    def _unwatch(self, fd: int) -> None:
        self._watched.pop(fd).remove_reader(fd)
        os.close(fd)


def _failure(follower: Follower) -> GroupError:
    """Of a rank whose socket has ended, unless it has told why before."""
    with suppress(EOFError, ValueError, TimeoutError):
        while True:
            kind, body = follower.link.receive(0.1)
            if kind is Kind.FAILED:
                return GroupError(f"rank {follower.rank}: {body.decode(errors='replace')}")
    return follower.ended()


def _start(rank: int, memory: int, meeting: int) -> Follower:
    here, there = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "shared.parallel.follower", str(there.fileno()), f"rank={rank}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the worker's own takes the ready line; logs go where the worker's go
            pass_fds=(there.fileno(), memory, meeting),
            env={**os.environ, "PYTHONPATH": _python_path(), "PYTHONSAFEPATH": "1"},
        )
    except BaseException:
        here.close()
        raise
    finally:
        there.close()
    return Follower(rank, process, Link(here))


def _python_path() -> str:
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(_ROOT), *(part for part in parts if part and part != str(_ROOT))])


def _described(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
