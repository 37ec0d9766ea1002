"""A Tandem whose workers come and go behind two names, as a compose service or a Kubernetes deployment scales them.

    async with Fleet(hosts, model=str(folder), prefill=2, decode=2) as fleet:
        member = await fleet.join("decode")
        await fleet.leave(fleet.prefill[0])

Workers of a kind share a port, at addresses 127.0.0.2, 127.0.0.3 and so on. The gateway finds them by the system's
resolver in a mount namespace with an /etc/hosts of its own.
"""

from __future__ import annotations

import itertools
import os
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from cli.supervisor import Member, Role, role_command
from tests.cluster import Cluster

Kind = Literal["prefill", "decode"]


class Hosts:
    """An /etc/hosts that processes started by `command` have instead of the machine's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[str, str] = {}  # by address:name
        self._write()
        done = subprocess.run(self._within(["true"]), capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no mount namespace with an /etc/hosts of its own: {done.stderr.strip()}")

    def command(self, role: Role) -> Sequence[str]:
        """How a supervisor starts a role: the gateway alone reads these names."""
        return self._within(role_command(role)) if role == "gateway" else role_command(role)

    def add(self, address: str, name: str) -> None:
        """From now on the name resolves to this address too."""
        self._names[address] = name
        self._write()

    def drop(self, address: str) -> None:
        """Nor does it any longer, if it did."""
        self._names.pop(address, None)
        self._write()

    def _write(self) -> None:
        # in place, for it is this very file that is mounted
        lines = [f"{address} {name}\n" for address, name in self._names.items()]
        self._path.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def _within(self, command: Sequence[str]) -> list[str]:
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        script = f'mount --bind {shlex.quote(str(self._path))} /etc/hosts && exec "$@"'
        return ["unshare", *own, "--mount", "sh", "-c", script, "sh", *command]


class Fleet(Cluster):
    """See the module; arguments are those of a Cluster. Members that left are in neither list."""

    def __init__(self, hosts: Hosts, **options: Any) -> None:
        self._hosts = hosts
        self._last = itertools.count(2)
        self._ports: dict[Kind, int] = {"prefill": _free_port(), "decode": _free_port()}
        names = {f"gateway.{kind}_workers": f"{kind}.test:{port}" for kind, port in self._ports.items()}
        super().__init__(**options, gateway_settings=names, command=hosts.command)

    async def add_prefill(self, settings: Mapping[str, Any] | None = None) -> Member:
        return await super().add_prefill({**(settings or {}), **self._place("prefill")})

    async def add_decode(self, settings: Mapping[str, Any] | None = None) -> Member:
        return await super().add_decode({**(settings or {}), **self._place("decode")})

    async def join(self, kind: Kind) -> Member:
        """One more worker, at an address of its own; its name has it before it answers."""
        member = await (self.add_prefill() if kind == "prefill" else self.add_decode())
        (self.prefill if kind == "prefill" else self.decode).append(member)
        return member

    async def leave(self, member: Member, *, first: Literal["name", "process"], kill: bool = False) -> None:
        """A worker goes for good: its name drops it, and it ends, in the order given."""
        group = self.prefill if member in self.prefill else self.decode
        group.remove(member)
        if first == "name":
            self.drop(member)
        if kill:
            await member.kill()
        else:
            assert await member.stop() == 0
        self.drop(member)

    def drop(self, member: Member) -> None:
        """The member's name has its address no longer."""
        self._hosts.drop(member.grpc.rpartition(":")[0])

    def _place(self, kind: Kind) -> dict[str, Any]:
        address = f"127.0.0.{next(self._last)}"
        self._hosts.add(address, f"{kind}.test")
        return {f"{kind}.host": address, f"{kind}.port": self._ports[kind]}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
