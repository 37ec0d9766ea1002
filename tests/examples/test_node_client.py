"""examples/node: a client that Node makes from the .proto files, against the running service."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import Cluster

FOLDER = Path(__file__).parents[2] / "examples/node"
PROMPT = "The capital of France is"

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="node or npm is not installed"
)


@pytest.fixture(scope="module")
def installed() -> None:
    """The packages of package-lock.json, installed again only when it changes."""
    lock, stamp = FOLDER / "package-lock.json", FOLDER / "node_modules/.installed"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=FOLDER, check=True, timeout=120)
        stamp.write_bytes(lock.read_bytes())


async def start(cluster: Cluster, *arguments: str) -> asyncio.subprocess.Process:
    command = ("node", str(FOLDER / "client.js"), "--address", cluster.grpc_target, *arguments)
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment)


async def run(cluster: Cluster, *arguments: str) -> tuple[int | None, str, str]:
    """Exit status, standard output, standard error."""
    process = await start(cluster, *arguments)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_text_is_what_python_gets(installed: None, cluster: Cluster) -> None:
    sampling = types_pb2.SamplingParams(max_tokens=24, temperature=0)
    expected = await cluster.generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling))
    status, out, err = await run(cluster, "--temperature", "0", "--max-tokens", "24", PROMPT)
    assert (status, out) == (0, expected.outputs[0].text)
    assert f"{expected.usage.prompt_tokens} prompt tokens, 24 generated" in err


async def test_chat_with_a_seed_beyond_a_javascript_number(installed: None, cluster: Cluster) -> None:
    turns = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="What is gravity?")])
    sampling = types_pb2.SamplingParams(max_tokens=24, temperature=1, seed=2**63 + 1)
    expected = await cluster.generate(inference_pb2.GenerateRequest(messages=turns, sampling=sampling))
    seed = str(2**63 + 1)
    arguments = ("--chat", "--temperature", "1", "--seed", seed, "--max-tokens", "24", "What is gravity?")
    assert (await run(cluster, *arguments))[:2] == (0, expected.outputs[0].text)


async def test_errors_arrive_as_grpc_status(installed: None, cluster: Cluster) -> None:
    status, out, err = await run(cluster, "--temperature=-1", PROMPT)
    assert (status, out) == (1, "")
    assert err.startswith("INVALID_ARGUMENT: sampling.temperature")


async def test_interrupting_it_cancels_the_request(installed: None, cluster: Cluster) -> None:
    process = await start(cluster, "--max-tokens", "1900", "--temperature", "1", "Once upon a time")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.read(1)  # tokens come while the request runs
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    async with asyncio.timeout(10):  # all 1900 tokens would take longer
        await cluster.settled()


async def test_a_wrong_flag_shows_how_it_is_called(installed: None, cluster: Cluster) -> None:
    status, out, err = await run(cluster, "--max-token", "5", PROMPT)
    assert (status, out) == (2, "")
    assert "--max-token" in err
    assert "usage: node client.js" in err


def test_the_lock_file_names_no_registry() -> None:
    lock = (FOLDER / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert "registry" not in lock
