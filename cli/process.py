"""One role process of Tandem: started, awaited until its ready line, followed to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LAST_LINES = 30


class StartError(Exception):
    """A process ended, or fell silent, before it was ready; the message holds its last lines."""


@dataclass(frozen=True)
class Ready:
    """The ready line of a process."""

    role: str
    grpc: str  # host:port
    http: str | None  # host:port
    pid: int
    worker_id: str

    @classmethod
    def parse(cls, line: str) -> Ready | None:
        """The ready line, or None if the line is another one."""
        try:
            event = json.loads(line)
        except ValueError:
            return None
        if not isinstance(event, dict) or event.get("event") != "ready":
            return None
        return cls(event["role"], event["grpc"], event.get("http"), event["pid"], event["worker_id"])


class RoleProcess(asyncio.SubprocessProtocol):
    """A child in a process group of its own; what it logs goes to `on_line`, line by line.

    process = await RoleProcess.start([python, "-m", "gateway"], on_line=print, ready_s=60)
    process.ready.grpc
    status = await process.stop(grace_s=10)
    """

    ready: Ready

    def __init__(self, on_line: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self._on_line = on_line
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._unfinished = {1: b"", 2: b""}  # by file descriptor, the beginning of a line
        self._end: asyncio.Future[int] = loop.create_future()
        self._first: asyncio.Future[bool] = loop.create_future()  # ready, or ended before

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        on_line: Callable[[str], None],
        ready_s: float,
        env: Mapping[str, str] | None = None,
    ) -> RoleProcess:
        """Starts `command` and returns once it printed its ready line.

        Raises StartError if it ends before, or is not ready after `ready_s` seconds; then nothing of it is left.
        """
        _, process = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(on_line),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env=env,
            process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which then stops all in order
        )
        try:
            async with asyncio.timeout(ready_s):
                if await process._first:
                    return process
            what = f"ended with {describe(process.status)} before it was ready"
        except TimeoutError:
            what = f"was not ready after {ready_s:g} s"
            await process.stop(grace_s=0)
        except asyncio.CancelledError:
            await process.stop(grace_s=0)
            raise
        raise StartError("\n  ".join([f"{what}; its last lines:", *process._last_lines]))

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        return self._pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._transport.get_returncode()

    async def wait(self) -> int:
        """Waits for the end and for the last line; returns the exit status, negative for a signal."""
        return await asyncio.shield(self._end)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, SIGKILL to the whole process group; that the process has ended is no error."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self._pid, number)
                else:
                    self._transport.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL to what is left after `grace_s` seconds; returns the exit status."""
        if grace_s > 0:
            self.send(signal.SIGTERM)
            await asyncio.wait({self._end}, timeout=grace_s)
        self.send(signal.SIGKILL)
        return await self.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        self._pid = transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._unfinished[fd] = (self._unfinished[fd] + data).split(b"\n")
        for line in lines:
            self._take(fd, line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._unfinished and (line := self._unfinished.pop(fd)):
            self._take(fd, line)

    def process_exited(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)  # whatever it started itself, which may hold the pipes open

    def connection_lost(self, exc: Exception | None) -> None:
        status = self._transport.get_returncode()
        assert status is not None
        self._transport.close()
        self._end.set_result(status)
        if not self._first.done():
            self._first.set_result(False)

    def _take(self, fd: int, data: bytes) -> None:
        line = data.decode(errors="replace")
        if fd == 1 and not self._first.done() and (ready := Ready.parse(line)):
            self.ready = ready
            self._first.set_result(True)
            return
        self._last_lines.append(line)
        self._on_line(line)


def describe(status: int | None) -> str:
    """Of an exit status, `status 1` or `SIGKILL`."""
    return signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
