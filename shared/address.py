"""The address of a process: the one it listens on, and the one at which others reach it."""

from __future__ import annotations

import ipaddress
import socket

from shared.config import ConfigError

# Of the ranges kept for documentation: nobody has them, and nothing is sent there.
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if ":" in host else host


def reachable(host: str, field: str, hostname: str | None = None) -> str:
    """The address that others are told: the one listened on, or for `0.0.0.0` and `::` one of this host.

    That is an address of the host's name, as a container's runtime writes it down; if those are loopback alone, the one
    from which other networks are reached. field: where `host` stands in the configuration. hostname: default: this
    host's.
    Raises ConfigError if the name does not resolve.
    """
    if not _is_unspecified(host):
        return host
    families = [socket.AF_INET] if host == "0.0.0.0" else [socket.AF_INET, socket.AF_INET6]
    name = socket.gethostname() if hostname is None else hostname
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{field}: {host} means every address of this host, and its name, {name!r}, does not resolve ({error}); "
            f"set {field} to the address at which the other processes reach this one, or add the name to /etc/hosts"
        ) from None
    own = [str(address[0]) for family, *_, address in infos if family in families]
    routed = [address for family in families if (address := _routed(family))]
    return next((address for address in [*own, *routed] if not _is_local(address)), [*own, *routed, "127.0.0.1"][0])


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_local(address: str) -> bool:
    """Whether it means another machine elsewhere, or nothing."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def _routed(family: socket.AddressFamily) -> str | None:
    """The address that packets to other networks are sent from."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_ELSEWHERE[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
