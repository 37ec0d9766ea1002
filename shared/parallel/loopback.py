"""Where gloo listens: at the address of the host's name, where others can reach it, or within this host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_INTERFACE = "GLOO_SOCKET_IFNAME"


@contextmanager
def loopback(wanted: bool) -> Iterator[None]:
    """Groups that are made meanwhile have their connections in this host, if that is wanted and the variable says
    nothing else."""
    if not wanted or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = "lo"
    try:
        yield
    finally:
        del os.environ[_INTERFACE]
