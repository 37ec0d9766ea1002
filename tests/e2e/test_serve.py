"""`./tandem up` as a user runs it: its ready text's commands work as printed, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
END_S = 30.0


@dataclass
class Service:
    """A running `./tandem up` in a session and a temporary folder of its own."""

    process: asyncio.subprocess.Process
    folder: Path
    ready_text: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def grpc(self) -> str:
        return _found(r"gRPC (\S+)", self.ready_text)

    @property
    def http(self) -> str:
        return _found(r"curl (\S+)/v1", self.ready_text)

    @property
    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    async def run(self, *command: str | Path) -> tuple[int, str, str]:
        """Runs a command in the user's folder; its status, output and errors."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
        output, errors = await asyncio.wait_for(process.communicate(), END_S)
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), END_S)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


@asynccontextmanager
async def up(model: Path | str, *flags: str) -> AsyncIterator[Service]:
    folder = Path(tempfile.mkdtemp(prefix="tandem-serve-"))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        ROOT / "tandem",
        *("up", "--port", "0", "--model", str(model), "--dtype", "float32", *flags),
        stdout=pipe,
        stderr=pipe,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    )
    service = Service(process, folder)
    assert process.stdout
    assert process.stderr
    reading = asyncio.create_task(_follow(process.stderr, service.log))
    try:
        async with asyncio.timeout(120):
            while "Ctrl-C stops it." not in service.ready_text:
                line = await process.stdout.readline()
                assert line, "\n".join(service.log)
                service.ready_text += line.decode()
        yield service
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading
        shutil.rmtree(folder, ignore_errors=True)


async def _follow(stream: asyncio.StreamReader, lines: list[str]) -> None:
    while line := await stream.readline():
        lines.append(line.decode().rstrip())


def pools(pids: list[int]) -> set[tuple[int, int]]:
    """The memory files of processes, by device and inode."""
    found = set()
    for pid in pids:
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                if "memfd:" in os.readlink(fd):
                    status = fd.stat()
                    found.add((status.st_dev, status.st_ino))
        except OSError:  # it ended, or it is another user's
            continue
    return found


def everyone() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def all_end(handles: list[int], timeout_s: float) -> bool:
    """Whether the processes end in time; closes the handles."""
    ended = [bool(select.select([handle], [], [], timeout_s)[0]) for handle in handles]
    for handle in handles:
        os.close(handle)
    return all(ended)


def listening(address: str) -> bool:
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


async def test_as_a_user_runs_it(tiny_model: Callable[[str], Path]) -> None:
    async with up(tiny_model("llama")) as service:
        # what the ready text says to paste
        for line in service.ready_text.splitlines():
            if line.startswith("  ") and (not line.strip().startswith("curl") or shutil.which("curl")):
                status, output, errors = await service.run("sh", "-c", line)
                assert status == 0, errors
                assert output.strip(), line

        client = ROOT / "examples/client.py"
        arguments = ("--address", service.grpc, "--max-tokens", "8")
        status, output, errors = await service.run(sys.executable, client, *arguments, "The capital of France is")
        assert status == 0, errors
        assert output.strip()
        assert "8 generated" in errors
        assert "SHARED_MEMORY" in errors
        status, _, errors = await service.run(
            sys.executable, client, "--address", service.grpc, "--temperature=-1", "x"
        )
        assert status == 1
        assert "INVALID_ARGUMENT" in errors
        assert "sampling.temperature" in errors

        await speak_http(service)
        await stop_it(service)


async def speak_http(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.http, timeout=END_S, trust_env=False) as client:
        models = (await client.get("/v1/models")).json()
        assert models["data"][0]["id"].startswith("tiny-llama")
        body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        whole = (await client.post("/v1/completions", json=body)).json()
        assert whole["usage"]["completion_tokens"] == 6
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
            lines = [line async for line in reply.aiter_lines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole["choices"][0]["text"]
        refused = await client.post("/v1/completions", json={**body, "top_p": 7})
        assert refused.status_code == 400
        assert "top_p" in refused.json()["error"]["message"]
        assert (await client.get("/healthz")).status_code == 200


async def stop_it(service: Service) -> None:
    """Ctrl-C: status 0, and nothing left of it."""
    children = service.children
    handles = [os.pidfd_open(pid) for pid in children]
    held = pools(children)
    assert len(children) == 3
    assert len(held) == 2
    assert list(service.folder.rglob("*.sock"))
    service.process.send_signal(signal.SIGINT)
    assert await service.ended() == 0
    assert all_end(handles, timeout_s=0)
    assert not pools(everyone()) & held
    assert not list(service.folder.iterdir())
    assert not listening(service.grpc)
    assert not listening(service.http)
    assert not [line for line in service.log if "ERROR" in line or "Traceback" in line or "WARNING" in line]


async def read_on(lines: AsyncIterator[str]) -> None:
    while True:
        await anext(lines)


async def test_killed(tiny_model: Callable[[str], Path]) -> None:
    """SIGKILL, with requests running: its processes end by themselves, and with them their memory."""
    async with up(tiny_model("llama")) as service:
        children = service.children
        handles = [os.pidfd_open(pid) for pid in children]
        held = pools(children)
        assert len(children) == 3
        assert len(held) == 2
        async with httpx.AsyncClient(base_url=service.http, timeout=END_S, trust_env=False) as client:
            body = {"prompt": "Hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                service.process.kill()
                with pytest.raises((httpx.TransportError, StopAsyncIteration)):
                    await read_on(lines)
        assert all_end(handles, END_S)
        assert not pools(everyone()) & held


@pytest.mark.slow
async def test_interrupted_twice(tiny_model: Callable[[str], Path]) -> None:
    """The first Ctrl-C lets what runs come to its end, the second does not."""
    async with up(tiny_model("llama"), "--set", "drain_s=60") as service:
        handles = [os.pidfd_open(pid) for pid in service.children]
        async with httpx.AsyncClient(base_url=service.http, timeout=END_S, trust_env=False) as client:
            body = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 8}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                service.process.send_signal(signal.SIGINT)
                while not any("stopping: 1 request" in line for line in service.log):
                    await anext(lines)
                service.process.send_signal(signal.SIGINT)
                await service.ended()
        assert all_end(handles, timeout_s=0)


async def test_the_workers_share_the_cores(cluster: Cluster) -> None:
    boards = (Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}").glob("cores-*")
    together = [set(struct.unpack_from("64i", board.read_bytes())) for board in boards]
    assert any({worker.pid for worker in cluster.workers} <= pids for pids in together)
