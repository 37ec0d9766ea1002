"""Who runs in the container, where it may write, and which namespaces it shares."""

from __future__ import annotations

import os
import pwd
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.doctor.finding import Finding, error, ok, warning
from shared.doctor.socket_folder import folder_of
from shared.doctor.surroundings import Surroundings
from shared.transport.descriptor_socket import PEER_CREDENTIALS


def user(surroundings: Surroundings) -> Iterator[Finding]:
    uid = os.geteuid()
    if uid or not surroundings.in_container:
        yield ok("user", f"user {uid}")
    else:
        text = "root in a container: what breaks out of a worker is root, and files in volumes become root's"
        yield warning("user", "root", text)


def cache(surroundings: Surroundings) -> Iterator[Finding]:
    """Models, compiled ops and packed weights lie there."""
    folder = _cache(surroundings)
    if folder is None:
        text = f"XDG_CACHE_HOME and HOME are not set and user {os.geteuid()} has no home: there is no place for models"
        yield error("cache", "cache not writable", text)
    elif (fault := _cannot_write(folder)) is None:
        yield ok("cache", f"{folder} takes models and compiled ops")
    else:
        text = f"{folder} takes no models and no compiled ops: {fault}"
        yield error("cache", "cache not writable", text)


def temporary_folder(_: Surroundings) -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as fault:
        text = f"there is none to write to, which gcc, sockets and the workers' board of cores need: {fault.strerror}"
        yield error("temporary folder", "temporary folder not writable", text)
        return
    yield ok("temporary folder", folder)


def namespaces(surroundings: Surroundings) -> Iterator[Finding]:
    """What a pool on a GPU can be handed over by."""
    if not surroundings.may_use_gpu or surroundings.config.transport.cuda_export == "descriptor":
        how = "pools are handed over as descriptors: workers need a folder of sockets in common, and no namespace"
        yield ok("namespaces", how)
        return
    own = [kind for kind in ("pid", "ipc") if not surroundings.is_host_namespace(kind)]
    if own:
        text = (
            f"transport.cuda_export is handle, and this container has namespaces of its own ({', '.join(own)}): CUDA "
            "opens handles only of processes in the same ones, so workers in other containers cannot map a pool of here"
        )
        yield warning("namespaces", "namespaces not shared", text)
    strangers = [path for path in sorted(folder_of(surroundings.config).glob("*.sock")) if _is_stranger(path)]
    if strangers:
        text = (
            f"transport.cuda_export is handle, and the worker at {strangers[0]} is in another PID namespace: "
            "its pool cannot be mapped here"
        )
        yield warning("namespaces", "another PID namespace", text)
    if not own and not strangers:
        yield ok("namespaces", "the host's own: workers can open each other's CUDA handles")


def _cache(surroundings: Surroundings) -> Path | None:
    if given := surroundings.environment.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        home = surroundings.environment.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None
    return Path(home) / ".cache"


def _cannot_write(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or to the one that it would be made in. Looking leaves nothing."""
    # unlike Path.exists it takes a folder that cannot be looked into for one that is not there
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as fault:
        return f"{place}: {fault.strerror}"


def _is_stranger(path: Path) -> bool:
    """Whether the kernel has no number here for the process that listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False  # nobody listens
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    return PEER_CREDENTIALS.unpack(credentials)[0] == 0
