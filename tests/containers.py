"""A little `docker compose up`: the services of a project as processes in namespaces of their own, without docker.

    async with Containers(project, folder, scale={"prefill": 2}) as containers:
        done = await containers.run("gateway-1", ["./tandem", "generate", "Hello"])
        containers.pid("gateway-1")

What a service's container has of compose.yaml, its process has here: command, environment, user, volumes, tmpfs, a
read-only root, no capabilities, no new privileges, PIDs, IPC, hostname and network of its own, where the names of the
services resolve to all their containers; health checks and the order of starts are followed. Of the host it sees what
an image would bring: the system's and Python's folders, and the tree as /app, all of it read-only. Named volumes are
folders below `folder`, those of type tmpfs are such.

Left out: images (the host's own files stand for them), cgroups, seccomp, ulimits, the init process, restarts, published
ports, internal networks (all containers share one bridge that leads nowhere). It takes no rights: whoever runs it is
the containers' user in a user namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.compose import ROOT, Service, seconds, service

SUBNET = "10.78.0"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
# what an image brings of a system
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/dev", "/sys")
WITHOUT_RIGHTS = "setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all --bounding-set=-all"
PROBE = "mount -t proc proc /proc && ip link add probe type bridge && ip link add left type veth peer name right"


def in_the_way() -> str:
    """Why this host lets us have no such namespaces; empty if it does."""
    try:
        probe = subprocess.run([*_unshare(1000), "--pid", "--fork", "sh", "-c", PROBE], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return probe.stderr.strip() or "no reason given" if probe.returncode else ""


def _unshare(uid: int) -> list[str]:
    users = [f"--map-user={uid}", f"--map-group={uid}", "--keep-caps"]
    return ["unshare", "--user", *users, "--net", "--mount", "--propagation=private"]


class Containers:
    """Entering starts every service and returns once all are healthy; leaving stops them in order.

    services: those to start, by default all that belong to no profile. scale: containers of a service, by default one.
    Raises AssertionError for one that ends, or does not become healthy.
    """

    def __init__(
        self,
        project: Mapping[str, Any],
        folder: Path,
        *,
        services: Sequence[str] | None = None,
        scale: Mapping[str, int] | None = None,
    ) -> None:
        chosen = services or [name for name, keys in project["services"].items() if "profiles" not in keys]
        self._request = {
            "project": {**project, "services": {name: project["services"][name] for name in chosen}},
            "folder": str(folder),
            "scale": dict(scale or {}),
        }
        self._pids: dict[str, int] = {}
        self.statuses: dict[str, int] = {}  # of all containers, once they are stopped

    async def __aenter__(self) -> Self:
        users = {keys["user"].split(":")[0] for keys in self._request["project"]["services"].values()}
        [uid] = users  # one user namespace has one user
        pipe = asyncio.subprocess.PIPE
        command = [*_unshare(int(uid)), sys.executable, "-m", "tests.containers"]
        self._host = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
        try:
            self._pids = await self._ask(self._request)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._host.stdin
        self._host.stdin.close()
        output, _ = await self._host.communicate()
        self.statuses = json.loads(output or "{}")

    def pid(self, container: str) -> int:
        """Of its first process, as the host counts."""
        return self._pids[container]

    async def run(self, container: str, command: Sequence[str]) -> tuple[int, str, str]:
        """As `docker compose exec`: status, output and errors."""
        return tuple(await self._ask({"container": container, "command": list(command)}))

    async def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._host.stdin
        assert self._host.stdout
        self._host.stdin.write(json.dumps(request).encode() + b"\n")
        answer = await self._host.stdout.readline()
        assert answer, "the containers could not be started; what they said is in the output above"
        return json.loads(answer)


# -- inside the namespaces ------------------------------------------------------------------------------------------


@dataclass
class Container:
    """One of a service's containers."""

    service: Service
    number: int
    address: str
    process: asyncio.subprocess.Process | None = None
    pid: int = 0

    @property
    def name(self) -> str:
        return f"{self.service.name}-{self.number}"

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": PATH, "HOSTNAME": self.name, **self.service.environment}


class Host:
    """Starts containers from a process that has every right in its namespaces."""

    def __init__(self, project: Mapping[str, Any], folder: str, scale: Mapping[str, int]) -> None:
        self._project = project
        self._folder = Path(folder)
        services = [service(project, name) for name in _in_order(project)]
        places = [(one, number) for one in services for number in range(1, scale.get(one.name, 1) + 1)]
        self.containers = {
            container.name: container
            for container in (Container(*place, f"{SUBNET}.{10 + i}") for i, place in enumerate(places))
        }

    async def start(self) -> None:
        """Every container, each once those that it waits for are as it wants them."""
        sh("ip link set lo up", "ip link add bridge type bridge", "ip link set bridge up")
        for name, options in self._project.get("volumes", {}).items():
            volume = self._folder / name
            volume.mkdir(exist_ok=True)
            if options:
                kind, source, flags = (options["driver_opts"][key] for key in ("type", "device", "o"))
                sh(f"mount -t {kind} -o {flags} {source} {volume}")
        lines = [f"{one.address} {one.service.name} {one.name}" for one in self.containers.values()]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self._folder / "passwd").write_text(f"tandem:x:{os.getuid()}:{os.getgid()}::/cache:/usr/sbin/nologin\n")
        waves: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            for name in dict.fromkeys(one.service.name for one in self.containers.values()):
                before = [waves[other] for other in service(self._project, name).waits_for]
                waves[name] = group.create_task(self._start_service(name, before))

    async def _start_service(self, name: str, before: Sequence[asyncio.Task[None]]) -> None:
        # a task that failed fails the group, and with it this one
        if before:
            await asyncio.wait(before)
        members = [one for one in self.containers.values() if one.service.name == name]
        await asyncio.gather(*(self._start_container(one) for one in members))

    async def _start_container(self, container: Container) -> None:
        """Returns once it is healthy, or for a service that others wait to complete, once it has ended well."""
        container.process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig=KILL", "unshare", "--net", "--uts", "--ipc", "--mount", "--propagation=private"),
            *("sh", "-euc", "\n".join(self._script(container))),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            env=container.environment,
        )
        if self._completes(container.service):
            status = await container.process.wait()
            assert status == 0, f"{container.name} ended with status {status}"
            return
        if check := container.service.healthcheck:
            assert check.test[0] == "CMD"
            ended = asyncio.create_task(container.process.wait())
            started = time.monotonic()
            # until it is healthy for the first time a failure counts for nothing, within the start period
            while (await self.run(container, check.test[1:], check.timeout_s))[0]:
                assert not ended.done(), f"{container.name} ended with status {ended.result()}"
                assert time.monotonic() - started < check.start_period_s, f"{container.name} does not become healthy"
                await asyncio.wait([ended], timeout=check.start_interval_s)
            ended.cancel()

    async def run(self, container: Container, command: Sequence[str], timeout_s: float = 60) -> tuple[int, str, str]:
        """A command in a container, with the rights of its user; status 1 where there is none yet."""
        container.pid = container.pid or self._first_process(container)
        if not container.pid:
            return 1, "", "it has no process yet"
        enter = f"nsenter --target={container.pid} --mount --net --uts --ipc --pid --root --wd {WITHOUT_RIGHTS}"
        process = await asyncio.create_subprocess_exec(
            *(*enter.split(), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=container.environment,
        )
        try:
            async with asyncio.timeout(timeout_s):
                output, errors = await process.communicate()
        except TimeoutError:
            process.kill()
            output, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    async def stop(self) -> dict[str, int]:
        """SIGTERM to each, those that wait for others first, SIGKILL after its grace; the statuses."""
        for container in reversed(self.containers.values()):
            if container.process is None:
                continue
            number = getattr(signal, container.service.keys["stop_signal"])
            with contextlib.suppress(ProcessLookupError):
                if pid := container.pid or self._first_process(container):
                    os.kill(pid, number)
            try:
                async with asyncio.timeout(seconds(container.service.keys["stop_grace_period"])):
                    await container.process.wait()
            except TimeoutError:
                container.process.kill()  # and with it all that it started
                await container.process.wait()
        return {name: one.process.returncode or 0 for name, one in self.containers.items() if one.process}

    def _completes(self, one: Service) -> bool:
        services = [service(self._project, name) for name in self._project["services"]]
        return any(other.waits_for.get(one.name) == "service_completed_successfully" for other in services)

    def _first_process(self, container: Container) -> int:
        """The container's PID 1 as it is counted here; 0 until it has its root and its folder."""
        assert container.process
        outer = container.process.pid
        with contextlib.suppress(OSError, ValueError):
            pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text())
            if os.readlink(f"/proc/{pid}/cwd") == f"{self._root(container)}/app":
                return pid
        return 0

    def _root(self, container: Container) -> Path:
        """Where its root is mounted, in its own mount namespace."""
        return self._folder.resolve() / f"root-{container.name}"

    def _script(self, container: Container) -> list[str]:
        """What makes the container, run in its network, IPC, UTS and mount namespaces."""
        keys = container.service.keys
        peer = f"to-{container.address.rpartition('.')[2]}"
        root = self._root(container)
        root.mkdir(exist_ok=True)
        hostname = self._folder / f"hostname-{container.name}"
        hostname.write_text(container.name + "\n")
        lines = [
            "ip link set lo up",
            f"ip link add eth0 type veth peer name {peer} netns {os.getpid()}",
            f"nsenter --target={os.getpid()} --net ip link set {peer} master bridge up",
            f"ip address add {container.address}/24 dev eth0",
            "ip link set eth0 up",
            f"hostname {container.name}",
            f"mount -t tmpfs -o mode=755 tmpfs {root}",
            f"mkdir {root}/proc",
        ]
        for folder in SYSTEM:
            if os.path.islink(folder):
                lines.append(f"ln -s {os.readlink(folder)} {root}{folder}")
            elif os.path.isdir(folder):
                lines += _bind(folder, f"{root}{folder}", read_only=folder not in ("/dev", "/sys"))
        for name, file in (("hosts", "hosts"), ("passwd", "passwd"), ("hostname", hostname.name)):
            lines.append(f"mount --bind {self._folder / file} {root}/etc/{name}")
        for text in keys.get("tmpfs", ()):
            target, _, options = text.partition(":")
            flags = ",".join(filter(None, ["noexec,nosuid,nodev,mode=1777", options]))
            lines += [f"mkdir -p {root}{target}", f"mount -t tmpfs -o {flags} tmpfs {root}{target}"]
        # .venv and what it refers to stand where they are
        environment = (ROOT / ".venv").resolve().parent
        for folder in dict.fromkeys((str(ROOT), str(environment), sys.base_prefix)):
            if not folder.startswith("/usr"):
                lines += _bind(folder, f"{root}{folder}", read_only=True)
        # an image has the stubs of its own tree, whosever .venv this is
        lines += _bind(str(ROOT / "protos"), f"{root}{environment}/protos", read_only=True)
        lines += _bind(str(ROOT), f"{root}/app", read_only=True)
        for source, target, read_only in container.service.volumes:
            place = source if source.startswith("/") else str(self._folder / source)
            lines += _bind(place, f"{root}{target}", read_only=read_only)
        if keys.get("read_only"):
            lines.append(f"mount -o remount,ro {root}")
        program = shlex.join(["./tandem", *container.service.command])
        inner = f"mount -t proc proc {root}/proc; exec chroot {root} {WITHOUT_RIGHTS} env --chdir=/app {program}"
        return [*lines, f"exec unshare --pid --fork --kill-child=KILL sh -euc {shlex.quote(inner)}"]


def _bind(source: str, target: str, *, read_only: bool) -> list[str]:
    lines = [f"mkdir -p {target}", f"mount --rbind {source} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if read_only else lines


def _in_order(project: Mapping[str, Any]) -> list[str]:
    """Services, each after those that it waits for."""
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        for other in service(project, name).waits_for:
            visit(other)
        ordered[name] = None

    for name in project["services"]:
        visit(name)
    return list(ordered)


def sh(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


async def main() -> None:
    """One request a line: first what to start, then commands to run; at the end of the input all is stopped."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    host = Host(**json.loads(await lines.readline()))
    try:
        await host.start()
        print(json.dumps({name: one.pid for name, one in host.containers.items()}), flush=True)
        while line := await lines.readline():
            request = json.loads(line)
            print(json.dumps(await host.run(host.containers[request["container"]], request["command"])), flush=True)
    finally:
        statuses = await host.stop()
    print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
