"""Starts, watches and stops the processes of one Tandem; `tandem up` and the integration tests both run on it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from cli.process import RoleProcess, StartError, describe

Role = Literal["gateway", "prefill_worker", "decode_worker"]
ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[Role, str] = {"gateway": "gateway", "prefill_worker": "prefill", "decode_worker": "decode"}

FIRST_DELAY_S, LAST_DELAY_S = 0.1, 5.0
STABLE_S = 30.0  # a process that ran this long starts again at once when it dies


def role_command(role: Role) -> list[str]:
    """The command that runs a role; its flags follow."""
    return [sys.executable, "-m", role, "--die-with-parent"]


class Member:
    """A place in the service: a role with its settings, and the process that fills it now.

    It keeps its ports over restarts, so that peers find it again.
    """

    process: RoleProcess | None = None
    restarts: int = 0

    def __init__(self, supervisor: Supervisor, role: Role, name: str, settings: dict[str, Any], revive: bool) -> None:
        self.role: Role = role
        self.name = name
        self.settings = settings
        self.revive = revive  # start again when it dies without being asked to
        self.grpc = ""  # host:port
        self.http: str | None = None  # host:port
        self._supervisor = supervisor
        self._watch: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.status is None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self.process is not None, f"{self.name} is not started"
        return self.process.pid

    async def start(self) -> None:
        """Starts the process and returns once it is ready. Raises StartError."""
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_alive())

    async def stop(self, grace_s: float | None = None) -> int | None:
        """Ends it in order, and for good; returns the exit status, None if it never ran."""
        await self._unwatch()
        return (
            await self.process.stop(self._supervisor.grace_s if grace_s is None else grace_s) if self.process else None
        )

    async def kill(self) -> None:
        """SIGKILL, and waits for the end. A member with `revive` comes back by itself."""
        assert self.process is not None, f"{self.name} is not started"
        process = self.process
        process.send(signal.SIGKILL)
        await process.wait()

    async def restart(self, settings: Mapping[str, Any] | None = None, grace_s: float | None = None) -> None:
        """Ends it in order if it runs, and starts it with these settings changed."""
        await self.stop(grace_s)
        self.settings.update(settings or {})
        await self.start()
        self.restarts += 1

    async def _spawn(self) -> None:
        supervisor = self._supervisor
        self.process = None
        try:
            self.process = await RoleProcess.start(
                [*supervisor.command(self.role), *supervisor.flags(self.settings)],
                on_line=lambda line: supervisor.on_line(self.name, line),
                ready_s=supervisor.ready_s,
                env=supervisor.env,
            )
        except StartError as error:
            raise StartError(f"{self.name} {error}") from None
        ready = self.process.ready
        self.grpc, self.http = ready.grpc, ready.http
        section = SECTIONS[self.role]
        self.settings[f"{section}.port"] = _port(ready.grpc)
        if ready.http:
            self.settings[f"{section}.http_port"] = _port(ready.http)

    async def _keep_alive(self) -> None:
        delay = FIRST_DELAY_S
        while self.process is not None:
            started = time.monotonic()
            status = await self.process.wait()
            if not self.revive:
                return
            if time.monotonic() - started > STABLE_S:
                delay = FIRST_DELAY_S
            self._say(f"ended with {describe(status)}; starts again in {delay:.1f} s")
            while True:
                await asyncio.sleep(delay)
                delay = min(delay * 2, LAST_DELAY_S)
                try:
                    await self._spawn()
                except StartError as error:
                    self._say(f"{error}\nanother try in {delay:.1f} s")
                else:
                    break
            self.restarts += 1
            self._say("is back")

    async def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
            self._watch = None

    def _say(self, text: str) -> None:
        self._supervisor.on_line(self.name, text)


class Supervisor:
    """The processes of one Tandem. Leaving the context stops them all, the gateways first.

        async with Supervisor(settings={"dtype": "float32"}) as supervisor:
            prefill = await supervisor.start("prefill_worker", {"prefill.port": 0})
            decode = await supervisor.start("decode_worker", {"decode.port": 0, "decode.max_running": 8})
            gateway = await supervisor.start("gateway", {"gateway.port": 0, "gateway.http_port": 0})
            await decode.kill()
            await decode.restart({"decode.max_running": 4})

    settings: `key.path` to value, for every process; those given to `start` win over them.
    on_line: gets the member's name and each line that it logs.
    revive: start a member again that dies without being asked to.
    ready_s: seconds that a process has to become ready. grace_s: seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, Any] | None = None,
        config_path: Path | None = None,
        on_line: Callable[[str, str], None] | None = None,
        revive: bool = False,
        ready_s: float = 120.0,
        grace_s: float = 15.0,
        env: Mapping[str, str] | None = None,
        command: Callable[[Role], Sequence[str]] = role_command,
    ) -> None:
        self.settings = dict(settings or {})
        self.config_path = config_path
        self.on_line = _print_line if on_line is None else on_line
        self.revive = revive
        self.ready_s = ready_s
        self.grace_s = grace_s
        self.env = {**_environment(), **(env or {})}
        self.command = command
        self.members: list[Member] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def of(self, role: Role) -> list[Member]:
        """The members of a role, in order of their start."""
        return [member for member in self.members if member.role == role]

    async def start(
        self,
        role: Role,
        settings: Mapping[str, Any] | None = None,
        *,
        revive: bool | None = None,
        name: str | None = None,
    ) -> Member:
        """Starts one more process and returns once it is ready.

        A gateway is told of every worker started before it, unless its settings name others.
        Raises StartError with the process's last lines.
        """
        name = name or f"{SECTIONS[role]}-{len(self.of(role))}"
        chosen = dict(settings or {})
        if role == "gateway":
            chosen.setdefault("gateway.prefill_workers", [member.grpc for member in self.of("prefill_worker")])
            if decode := [member.grpc for member in self.of("decode_worker")]:
                chosen.setdefault("gateway.decode_workers", decode)
        member = Member(self, role, name, chosen, self.revive if revive is None else revive)
        self.members.append(member)
        try:
            await member.start()
        except BaseException:
            self.members.remove(member)
            raise
        return member

    async def stop(self) -> None:
        """Ends every process in order: gateways, so that no request comes in or is left waiting, then workers."""
        gateways, others = self.of("gateway"), [member for member in self.members if member.role != "gateway"]
        for group in (gateways, others):
            await asyncio.gather(*(member.stop() for member in group))
        self.members.clear()

    def kill(self) -> None:
        """SIGKILL to all at once; `stop` has to follow."""
        for member in self.members:
            member.revive = False
            if member.process:
                member.process.send(signal.SIGKILL)

    def flags(self, settings: Mapping[str, Any]) -> list[str]:
        """The flags by which a role gets its configuration."""
        flags = ["--config", str(self.config_path)] if self.config_path else []
        for key, value in {**self.settings, **settings}.items():
            flags += ["--set", f"{key}={json.dumps(value, default=str)}"]
        return flags


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        # OpenMP threads that spin while another process wants their core slow all down 5 to 20 times
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(part for part in path if part and part != str(ROOT))]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _print_line(name: str, line: str) -> None:
    print(f"{name:<9} | {line}", file=sys.stderr, flush=True)
