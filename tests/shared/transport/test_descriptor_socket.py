import asyncio
import mmap
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.transport import descriptor_socket
from shared.transport.descriptor_socket import HEADER, MAGIC, DescriptorServer, attach
from shared.transport.mapping import Mapping
from shared.transport.pool_memory import PoolMemory

NUM_BYTES = 4 * mmap.PAGESIZE


@pytest.fixture
def memory():
    memory = PoolMemory(NUM_BYTES)
    yield memory
    memory.close()


@pytest.fixture
async def server(memory, tmp_path):
    server = DescriptorServer(memory.read_only_fd(), 5, NUM_BYTES, tmp_path)
    yield server
    server.close()


def answer_once(path: Path, header: bytes, fds: list[int]) -> socket.socket:
    """A peer that says something else than it should."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        with listener.accept()[0] as connection:
            socket.send_fds(connection, [header], fds)

    asyncio.get_running_loop().run_in_executor(None, answer)
    return listener


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop turn until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def test_passes_a_read_only_mapping(memory, server):
    memory.buffer[:3] = b"abc"
    mapping = await asyncio.to_thread(Mapping, str(server.path), 5, NUM_BYTES)
    view = memoryview(mapping._map)
    assert view.readonly
    assert bytes(view[:3]) == b"abc"
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    view.release()
    mapping.close()


async def test_each_side_learns_of_the_others_end(memory, tmp_path, held):
    before = held()
    server = DescriptorServer(memory.read_only_fd(), 5, NUM_BYTES, tmp_path)
    gone = asyncio.Event()
    stays, leaves = [await asyncio.to_thread(Mapping, str(server.path), 5, NUM_BYTES) for _ in range(2)]
    stays.watch(gone.set)
    assert len(server._connections) == 2
    leaves.close()
    await until(lambda: len(server._connections) == 1)
    assert not gone.is_set()
    server.close()
    server.close()
    await asyncio.wait_for(gone.wait(), 5)
    assert bytes(memoryview(stays._map)[:3]) == bytes(3)  # mapped still
    stays.close()
    assert held()[0] <= before[0]
    assert held()[1] == before[1]
    assert not list(tmp_path.iterdir())


async def test_a_client_that_writes_is_ended(server):
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, str(server.path))
        await loop.sock_sendall(client, b"?")
        received = b"?"
        while received:  # the header, then the end
            try:
                received = await loop.sock_recv(client, 100)
            except ConnectionResetError:
                break
        assert not server._connections


async def test_ends_connections_beyond_the_bound(server, monkeypatch):
    monkeypatch.setattr(descriptor_socket, "MAX_CONNECTIONS", 0)
    with pytest.raises(OSError, match="no descriptor"):
        await asyncio.to_thread(attach, str(server.path), 5, NUM_BYTES)


@pytest.mark.parametrize(("epoch", "num_bytes"), [(6, NUM_BYTES), (5, NUM_BYTES + 1)])
async def test_refuses_another_pool(server, epoch, num_bytes):
    with pytest.raises(OSError, match="another pool"):
        await asyncio.to_thread(attach, str(server.path), epoch, num_bytes)


async def test_names_the_path_that_nobody_serves(tmp_path):
    with pytest.raises(OSError, match=r"absent\.sock: No such file"):
        attach(str(tmp_path / "absent.sock"), 1, 1)
    for path in ("x" * 200, "a\0b"):
        with pytest.raises(OSError, match="no path"):
            attach(path, 1, 1)


@pytest.mark.parametrize("case", ["header", "no descriptor", "size", "unsealed", "no memory file"])
async def test_refuses_what_is_no_pool(case, tmp_path, held):
    before = held()[1]
    header = HEADER.pack(MAGIC, 5, NUM_BYTES)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, NUM_BYTES + (1 if case == "size" else 0))
    other = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(other, NUM_BYTES)
    fds = {"no descriptor": [], "no memory file": [other]}.get(case, [unsealed])
    listener = answer_once(tmp_path / "peer", header[:5] if case == "header" else header, fds)
    expected = {"size": "of 16385 bytes", "unsealed": "not sealed", "no memory file": "not sealed"}.get(
        case, "no descriptor"
    )
    with pytest.raises(OSError, match=expected):
        await asyncio.to_thread(Mapping, str(tmp_path / "peer"), 5, NUM_BYTES)
    listener.close()
    os.close(unsealed)
    os.close(other)
    assert held()[1] == before


async def test_refuses_another_user(server, monkeypatch):
    real = descriptor_socket.peer_uid
    monkeypatch.setattr(descriptor_socket, "peer_uid", lambda connection: real(connection) + 1)
    with pytest.raises(OSError, match="belongs to user"):
        await asyncio.to_thread(attach, str(server.path), 5, NUM_BYTES)
    assert not server._connections


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_gives_another_user_nothing(memory):
    # the socket's folder is closed to others, so this one lies in the open
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        server = DescriptorServer(memory.read_only_fd(), 5, NUM_BYTES, Path(folder))
        os.chmod(server.path, 0o777)
        code = f"""
import os, socket
os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.connect({str(server.path)!r})
data, fds, _, _ = socket.recv_fds(client, 100, 1)
print(data, fds)
"""
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout == "b'' []\n"
        server.close()


async def test_makes_a_private_folder_and_removes_it(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = DescriptorServer(memory.read_only_fd(), 1, NUM_BYTES)
    second = DescriptorServer(memory.read_only_fd(), 2, NUM_BYTES)
    folder = first.path.parent
    assert second.path.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first.close()
    assert list(folder.iterdir()) == [second.path]
    second.close()
    assert not folder.exists()
    folder.mkdir(mode=0o755)
    with pytest.raises(OSError, match="not a private folder"):
        DescriptorServer(memory.read_only_fd(), 1, NUM_BYTES)


async def test_removes_the_sockets_of_killed_workers_only(memory, server, tmp_path):
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    another = DescriptorServer(memory.read_only_fd(), 6, NUM_BYTES, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([server.path, another.path])
    another.close()


async def test_says_when_the_folder_cannot_serve(memory, tmp_path, held):
    (tmp_path / "file").touch()
    before = held()
    for folder, reason in [
        (tmp_path / ("x" * 100), "socket_dir"),
        (tmp_path / "file", "file"),
        (tmp_path / "file" / "below", "file"),
    ]:
        with pytest.raises(OSError, match=reason):
            DescriptorServer(memory.read_only_fd(), 1, NUM_BYTES, folder)
    assert held()[0] <= before[0]
    assert held()[1] == before[1]
