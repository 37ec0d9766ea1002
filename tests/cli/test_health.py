"""`./tandem health` as a container's health check runs it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from shared.rpc import Health

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def server() -> AsyncIterator[tuple[Health, str]]:
    """A server that only has health, and its address."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    health = Health(server, ["tandem.v1.InferenceService"])
    await server.start()
    yield health, f"127.0.0.1:{port}"
    await server.stop(None)


async def ask(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(str(ROOT / "tandem"), "health", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "http_proxy": "http://127.0.0.1:1"},  # not for what is near
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_status_is_that_of_the_process(server: tuple[Health, str]) -> None:
    health, address = server
    await health.set(True)
    assert await ask(address) == (0, "SERVING\n")
    assert await ask(address, "--service", "tandem.v1.InferenceService") == (0, "SERVING\n")
    await health.set(False)
    assert await ask(address) == (1, "NOT_SERVING\n")


async def test_what_is_not_there_is_not_healthy(server: tuple[Health, str]) -> None:
    _, address = server
    status, text = await ask(address, "--service", "nobody.Knows")
    assert status == 1
    assert "NOT_FOUND" in text
    status, text = await ask("127.0.0.1:1", "--timeout", "1")
    assert status == 1
    assert "no answer at 127.0.0.1:1" in text


def test_it_loads_little() -> None:
    script = "import sys, cli.__main__, cli.health; print(*{'torch', 'pydantic', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
