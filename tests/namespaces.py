"""Processes in user, network, PID, IPC and mount namespaces of their own, as containers have them, on one network.

    with Network(["10.77.0.2:50061", "10.77.0.4:8080"]) as network:
        command = network.command("10.77.0.2", [sys.executable, "-m", "prefill_worker"], folders=[model, sockets])
        network.reach("10.77.0.4:8080")  # host:port at which processes outside reach that address

The network is a bridge in a namespace of its own, and each process has an address on it. Of the temporary folder a
process sees the code and `folders`, and nothing else; /dev/shm is empty too. Nothing of all this ever lies on the host,
and the kernel takes it away with the processes that hold it. It takes no rights: everybody is root in a user namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
SUBNET = "10.77.0"
BRIDGE = "bridge"
PROBE = "ip link add probe type bridge && ip link add left type veth peer name right"

# of <linux/sched.h>, <linux/mount.h> and <linux/prctl.h>: Python 3.11 has none of these calls
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MOUNT_BIND, MOUNT_REC, MOUNT_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1


def in_the_way() -> str:
    """Why this host has no such namespaces for us; empty if it has."""
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--ipc", "--mount", "--fork", "--mount-proc"]
    try:
        probe = subprocess.run([*unshare, "sh", "-c", PROBE], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return probe.stderr.strip() or "no reason given" if probe.returncode else ""


class Network:
    """See the module. reachable: what processes outside will ask for, as host:port of a member-to-be."""

    def __init__(self, reachable: Sequence[str] = ()) -> None:
        self._listeners = {address: socket.create_server(("127.0.0.1", 0)) for address in reachable}

    def __enter__(self) -> Self:
        relayed = {address: listener.fileno() for address, listener in self._listeners.items()}
        self._hub = subprocess.Popen(
            [sys.executable, __file__, "hub", json.dumps(relayed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(relayed.values()),
        )
        assert self._hub.stdout
        if not self._hub.stdout.readline():
            self.__exit__()
            raise OSError("the network's own process has ended")
        return self

    def __exit__(self, *_: object) -> None:
        self._hub.communicate()  # it ends with its standard input
        for listener in self._listeners.values():
            listener.close()

    def command(self, host: str, command: Sequence[str], *, folders: Sequence[Path] = ()) -> list[str]:
        """The command that runs `command` at the address `host`. It passes on SIGTERM and SIGINT, and dies with us.

        folders: below the temporary folder, which it sees beside the code.
        """
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        seen = [str(Path(folder).resolve()) for folder in (ROOT, sys.prefix, sys.base_prefix, cache, *folders)]
        return [sys.executable, __file__, "join", str(self._hub.pid), host, json.dumps(seen), *command]

    def reach(self, address: str) -> str:
        """host:port outside of a reachable address; any other address as it is."""
        listener = self._listeners.get(address)
        return f"127.0.0.1:{listener.getsockname()[1]}" if listener else address


# -- the network's own process ----------------------------------------------------------------------------------------


def run_hub(relayed: dict[str, int]) -> None:
    """Holds the bridge until its standard input ends, and relays connections that come from outside.

    relayed: from host:port on the bridge to the descriptor of a listening socket, which stays outside.
    """
    die_with_parent()
    unshare(NEW_NET, user=True)
    ip(f"link add {BRIDGE} type bridge", f"address add {SUBNET}.1/24 dev {BRIDGE}", f"link set {BRIDGE} up")
    ip("link set lo up")
    asyncio.run(relay(relayed))


async def relay(relayed: dict[str, int]) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def connecting(address: str) -> Any:
        host, _, port = address.rpartition(":")

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

        return connected

    for address, fd in relayed.items():
        await asyncio.start_server(connecting(address), sock=socket.socket(fileno=fd))
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


# -- a process on the network -----------------------------------------------------------------------------------------


def join(hub: int, host: str, folders: list[str], command: list[str]) -> None:
    """Runs the command as process 1 of its namespaces, and ends with its status."""
    enter(os.pidfd_open(hub), NEW_USER | NEW_NET)
    outer = os.open("/proc/self/ns/net", os.O_RDONLY)
    unshare(NEW_NET)
    inner = os.open("/proc/self/ns/net", os.O_RDONLY)
    # the interface of a process that has ended goes some time later, so its name is not taken again; but the hardware
    # address stays with the host, as its neighbours remember it
    name = f"to{os.getpid()}"
    hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in host.split("."))
    ip(f"link add eth0 address {hardware} type veth peer name {name} netns {hub}", "link set lo up")
    ip(f"address add {host}/24 dev eth0", "link set eth0 up")
    enter(outer, NEW_NET)
    ip(f"link set {name} master {BRIDGE} up")
    enter(inner, NEW_NET)
    unshare(NEW_IPC | NEW_PID | NEW_MOUNTS, user=True)  # the next child has them all
    die_with_parent()
    child = os.fork()
    if not child:
        die_with_parent()
        hide_folders(folders)
        os.execvp(command[0], command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if status >= 0 else 128 - status)


def hide_folders(seen: list[str]) -> None:
    """Leaves of the temporary folder what is seen, and nothing in /dev/shm; /proc shows this namespace's processes."""
    temporary = Path(tempfile.gettempdir()).resolve()
    here = Path.cwd()
    below = [path for path in map(Path, seen) if path.is_relative_to(temporary) and path.is_dir()]
    handles = [os.open(path, os.O_PATH) for path in below]
    mount("/", MOUNT_REC | MOUNT_PRIVATE)
    mount("/proc", kind="proc")
    mount("/dev/shm", kind="tmpfs")
    mount(str(temporary), kind="tmpfs")
    for path, handle in zip(below, handles, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        mount(str(path), MOUNT_BIND | MOUNT_REC, source=f"/proc/self/fd/{handle}")
        os.close(handle)
    os.chdir(here)  # where it lay before is hidden now


# -- what the kernel does ---------------------------------------------------------------------------------------------


def call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def enter(handle: int, kinds: int) -> None:
    call("setns", handle, kinds)


def unshare(kinds: int, *, user: bool = False) -> None:
    """Makes namespaces for this process; user: one in which our user is root, and nobody else exists."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", kinds | (NEW_USER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def mount(target: str, flags: int = 0, *, source: str = "none", kind: str = "none") -> None:
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None)


def die_with_parent() -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "hub":
        run_hub(json.loads(sys.argv[2]))
    else:
        join(int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), sys.argv[5:])
