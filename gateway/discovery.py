"""Which addresses stand behind the host:port that the configuration names, as they come and go.

A name may resolve to many addresses: the containers of a compose service that is scaled, the pods of a headless
service of Kubernetes. It is looked up every few seconds, and at once when a worker of its went away.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from tandem.v1 import worker_pb2

from gateway.worker import ROLE_NAMES

log = logging.getLogger(__name__)

_LOOK_UP_S = 2.0

# (host, port) → IP addresses; raises OSError where there is no answer
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """By the resolver of the system: /etc/hosts, then the DNS of the host, of compose or of Kubernetes."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in infos]


class Entry:
    """One host:port of gateway.prefill_workers or gateway.decode_workers.

    targets: address:port of each address that it stands for; a literal address is its own, and is never looked up.
    problem: why the last look-up brought nothing, empty if it did. What was known before it stays.
    """

    def __init__(self, name: str, role: worker_pb2.WorkerRole.ValueType, resolve: Resolve = resolve) -> None:
        self.name, self.role = name, role
        self.problem = ""
        host, _, port = name.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._resolve = resolve
        self._wanted = asyncio.Event()
        self.literal = True
        self.targets: tuple[str, ...] = ()
        try:
            self.targets = self._join([self._host])
        except ValueError:
            self.literal = False

    def __str__(self) -> str:
        name = f"{ROLE_NAMES[self.role]} worker {self.name}"
        return f"{name} ({self.problem})" if self.problem else name

    def look_again(self) -> None:
        """Looks the name up now rather than at its next turn."""
        self._wanted.set()

    async def follow(self, looked_up: Callable[[], None]) -> None:
        """Looks the name up for ever. looked_up: called after each time, whatever came of it."""
        while True:
            self._wanted.clear()
            try:
                await self._look_up()
                looked_up()
            except Exception:
                # a bug must not leave the name unwatched for the rest of the gateway's life
                log.exception("looking up %s failed", self.name)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_UP_S):
                    await self._wanted.wait()

    async def _look_up(self) -> None:
        targets: tuple[str, ...] = ()
        problem = "its name has no address"
        try:
            targets = self._join(await self._resolve(self._host, self._port))
        except (OSError, UnicodeError) as error:  # UnicodeError: what cannot be a name at all
            problem = f"its name does not resolve: {error}"
        if targets:
            self.targets, self.problem = targets, ""
        elif problem != self.problem:
            self.problem = problem
            log.warning("%s%s", self, f"; {', '.join(self.targets)} stay" if self.targets else "")

    def _join(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """address:port of each, in order and once. Raises ValueError for what is no IP address."""
        unique = {str(ipaddress.ip_address(address)) for address in addresses}
        return tuple(f"[{one}]:{self._port}" if ":" in one else f"{one}:{self._port}" for one in sorted(unique))
