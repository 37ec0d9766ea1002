"""The address that a worker tells others."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from shared import address
from shared.address import bracketed, reachable
from shared.config import ConfigError
from tests.workers import running_worker

HOSTNAME = "worker-7"
EVERY_ADDRESS = ["0.0.0.0", "::"]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what this host's name resolves to, and where packets to other networks are sent from."""

    def say(*own: str, routed: str | None = None) -> None:
        def getaddrinfo(name: str, *_: Any, **__: Any) -> list[Any]:
            assert name == HOSTNAME
            family = {4: socket.AF_INET, 6: socket.AF_INET6}
            return [(family[ipaddress.ip_address(one).version], 0, 0, "", (one, 0)) for one in own]

        monkeypatch.setattr(address.socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(address, "_routed", lambda family: routed if family == socket.AF_INET else None)

    return say


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.7", "::1", "prefill.internal"])
def test_an_address_of_its_own_is_told(host: str) -> None:
    assert reachable(host, "prefill.host", HOSTNAME) == host


@pytest.mark.parametrize(
    ("host", "own", "routed", "told"),
    [
        ("0.0.0.0", ["10.0.0.7"], None, "10.0.0.7"),
        ("0.0.0.0", ["10.0.0.7", "172.20.0.3"], "172.20.0.3", "10.0.0.7"),
        ("0.0.0.0", ["fd00::7", "10.0.0.7"], None, "10.0.0.7"),  # nobody listens on the other one
        ("::", ["fd00::7", "10.0.0.7"], None, "fd00::7"),
        ("::", ["10.0.0.7"], None, "10.0.0.7"),
        ("0.0.0.0", ["127.0.1.1"], "192.168.1.5", "192.168.1.5"),  # as Debian writes its own name down
        ("::", ["fe80::1", "::1"], "192.168.1.5", "192.168.1.5"),
        ("0.0.0.0", ["127.0.1.1"], None, "127.0.1.1"),  # a host without a network
        ("0.0.0.0", ["fd00::7"], None, "127.0.0.1"),
    ],
)
def test_of_many_addresses_one_that_others_reach(
    hosts: Callable[..., None], host: str, own: list[str], routed: str | None, told: str
) -> None:
    hosts(*own, routed=routed)
    assert reachable(host, "prefill.host", HOSTNAME) == told


@pytest.mark.parametrize("host", EVERY_ADDRESS)
def test_a_name_that_does_not_resolve(host: str) -> None:
    with pytest.raises(ConfigError) as error:
        reachable(host, "prefill.host", "no-such-host.invalid")
    message = str(error.value)
    assert message.startswith(f"prefill.host: {host} means every address of this host, and its name, ")
    assert "'no-such-host.invalid', does not resolve" in message
    assert "set prefill.host to the address at which the other processes reach this one" in message


@pytest.mark.parametrize("host", EVERY_ADDRESS)
async def test_a_worker_on_every_address_answers_at_the_one_it_tells(
    host: str, tiny_model: Callable[[str], Path]
) -> None:
    async with running_worker("prefill", tiny_model("llama"), host=host) as (worker, channel):
        told = worker.address.rpartition(":")[0].strip("[]")
        assert not ipaddress.ip_address(told).is_unspecified
        await channel.channel_ready()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_address_that_is_not_this_hosts(
    role: Literal["prefill", "decode"], tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(RuntimeError, match=rf"^{role}.host: 203.0.113.9:0 cannot be listened on .*0.0.0.0 or :: = all"):
        async with running_worker(role, tiny_model("llama"), host="203.0.113.9"):
            pass


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert [bracketed(host) for host in ("::1", "127.0.0.1", "name")] == ["[::1]", "127.0.0.1", "name"]
