"""A service whose processes are in namespaces of their own, as in containers: the workers share one folder, or none."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tandem.v1 import decode_pb2, decode_pb2_grpc, types_pb2, worker_pb2

from cli.process import StartError
from cli.supervisor import Role
from tests.cluster import Cluster
from tests.e2e.faults import ask, failure, prompt
from tests.namespaces import Network, in_the_way
from tests.workers import Request, generate, running_worker, sampling

PREFILL, DECODE, GATEWAY = "10.77.0.2", "10.77.0.3", "10.77.0.4"
HOSTS: dict[Role, str] = {"prefill_worker": PREFILL, "decode_worker": DECODE, "gateway": GATEWAY}
REACHABLE = (f"{PREFILL}:50061", f"{DECODE}:50071", f"{GATEWAY}:50051", f"{GATEWAY}:8080")
SETTINGS = {
    "dtype": "float32",
    "prefill.host": PREFILL,
    "prefill.chunk_tokens": 64,
    "decode.host": DECODE,
    "gateway.host": GATEWAY,
}
PORTS: dict[str, Any] = {
    "prefill_settings": {"prefill.port": 50061},
    "decode_settings": {"decode.port": 50071},
    "gateway_settings": {"gateway.port": 50051, "gateway.http_port": 8080},
}
Code = grpc.StatusCode
# more than one chunk, block edges, and one token
ASKED = [ask(prompt(length), temperature=0.9, seed=length, max_tokens=12) for length in (1, 32, 33, 300)]


class Scene:
    """The service; `cluster` is there once it runs."""

    cluster: Cluster

    def __init__(self, network: Network, model: Path, sockets: Path) -> None:
        self.network, self.model, self.sockets = network, model, sockets
        self.shared, self.required = True, False  # whether the decode worker sees the sockets, and insists on them

    def command(self, role: Role) -> list[str]:
        """Every process has the model; the sockets are the prefill worker's, and the decode worker's if it may."""
        sees = role == "prefill_worker" or (role == "decode_worker" and self.shared)
        folders = [self.model, self.sockets] if sees else [self.model]
        return self.network.command(HOSTS[role], [sys.executable, "-m", role], folders=folders)

    async def arrange(self, *, shared: bool, required: bool = False) -> None:
        """Has the decode worker as a test wants it, beside a gateway that knows of it."""
        if (shared, required) == (self.shared, self.required):
            return
        self.shared, self.required = shared, required
        gateway, [decode] = self.cluster.gateway, self.cluster.decode
        await decode.restart({"transport.require": "shared_memory" if required else None})
        if not gateway.alive:  # it refused to start on a pair before
            await gateway.restart()
        await self.cluster.known(decode)

    async def peer(self) -> worker_pb2.Peer:
        """The prefill worker, as the decode worker describes it."""
        [peer] = (await self.cluster.info(self.cluster.decode[0])).peers
        return peer

    async def handed_over(self) -> dict[str, float]:
        """Bytes by transport, as the gateway's metrics have them."""
        async with httpx.AsyncClient(trust_env=False) as client:
            lines = (await client.get(f"{self.cluster.http_url}/metrics")).text.splitlines()
        counts = [line.split() for line in lines if line.startswith("tandem_handoff_bytes_total{")]
        return {name.split('"')[1]: float(value) for name, value in counts}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := in_the_way():
        pytest.skip(f"this host gives us no namespaces: {reason}")
    with Network(REACHABLE) as network:
        yield network


@pytest.fixture(scope="module")
async def scene(network: Network, tiny_model: Callable[[str], Path]) -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="tandem-sockets-") as sockets:
        scene = Scene(network, tiny_model("llama"), Path(sockets))
        async with Cluster(
            model=str(scene.model),
            settings={**SETTINGS, "transport.socket_dir": sockets},
            **PORTS,
            command=scene.command,
            reach=network.reach,
        ) as scene.cluster:
            yield scene


@pytest.fixture(scope="module")
async def expected(tiny_model: Callable[[str], Path]) -> list[list[int]]:
    """The tokens of ASKED, from one worker in this process that computes prompts itself."""
    async with running_worker("decode", tiny_model("llama")) as (_, channel):
        answers = []
        for request in ASKED:
            params = sampling(max_tokens=12, temperature=0.9, seed=request.sampling.seed)
            answers.append(await generate(None, channel, Request(list(request.token_ids.ids), params)))
        return [answer.outputs[0].token_ids for answer in answers]


async def serves(scene: Scene, transport: types_pb2.Transport.ValueType, expected: list[list[int]]) -> None:
    """Asks everything, which comes over this transport, and is what it is to be."""
    for request, tokens in zip(ASKED, expected, strict=True):
        result = await scene.cluster.generate(request)
        assert result.outputs[0].token_ids == tokens
        assert result.receipt.transport == transport
        assert result.receipt.handoff_bytes > 0
    await scene.cluster.settled()


def test_they_see_nothing_of_each_other(scene: Scene) -> None:
    """Or the other tests would show nothing."""
    # each is the only child of the process that we started
    pids = [int(Path(f"/proc/{m.pid}/task/{m.pid}/children").read_text()) for m in scene.cluster.members]
    for kind in ("user", "net", "pid", "ipc", "mnt"):
        assert len({Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in ["self", *pids]}) == 4, kind
    for pid in pids:
        assert not list(Path(f"/proc/{pid}/root/dev/shm").iterdir())
    sees_sockets = [Path(f"/proc/{pid}/root{scene.sockets}").exists() for pid in pids]
    assert sees_sockets == [False, True, scene.shared]


def test_nothing_of_it_is_left() -> None:
    """Nor is it on the host before: of interfaces and mounts there are those that there were."""
    if reason := in_the_way():
        pytest.skip(f"this host gives us no namespaces: {reason}")

    def host() -> tuple[list[tuple[int, str]], str]:
        return socket.if_nameindex(), Path("/proc/self/mounts").read_text()

    before = host()
    with Network() as network:
        joined = subprocess.Popen(network.command(PREFILL, ["cat"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert joined.stdin
        assert joined.stdout
        joined.stdin.write(b"here\n")
        joined.stdin.flush()
        assert joined.stdout.readline() == b"here\n"
        cat = os.pidfd_open(int(Path(f"/proc/{joined.pid}/task/{joined.pid}/children").read_text()))
        assert host() == before
        joined.kill()
        joined.communicate()
        assert select.select([cat], [], [], 10)[0]
        os.close(cat)
    assert host() == before


async def test_one_shared_folder_is_enough_for_shared_memory(scene: Scene, expected: list[list[int]]) -> None:
    await scene.arrange(shared=True)
    before = await scene.handed_over()
    await serves(scene, types_pb2.TRANSPORT_SHARED_MEMORY, expected)
    peer = await scene.peer()
    assert (peer.transport, list(peer.refusals)) == (types_pb2.TRANSPORT_SHARED_MEMORY, [])
    assert peer.kv_endpoint == f"{PREFILL}:50061"
    after = await scene.handed_over()
    assert after["shared_memory"] > before.get("shared_memory", 0)
    assert after.get("inline") == before.get("inline")


async def test_without_it_they_go_inline_and_say_why(scene: Scene, expected: list[list[int]]) -> None:
    seen = len(scene.cluster.log)
    await scene.arrange(shared=False)
    before = await scene.handed_over()
    await serves(scene, types_pb2.TRANSPORT_INLINE, expected)
    peer = await scene.peer()
    assert peer.transport == types_pb2.TRANSPORT_INLINE
    [refusal] = peer.refusals
    assert refusal.transport == types_pb2.TRANSPORT_SHARED_MEMORY
    assert str(scene.sockets) in refusal.reason
    assert "transport.socket_dir" in refusal.reason
    await scene.cluster.logged("takes KV blocks", "over inline", refusal.reason, after=seen)
    after = await scene.handed_over()
    assert after["inline"] > before.get("inline", 0)
    assert after.get("shared_memory") == before.get("shared_memory")


async def test_where_it_is_required_nobody_goes_without(scene: Scene) -> None:
    """The decode worker refuses the pair, and a gateway does not start on it: both say why."""
    await scene.arrange(shared=False, required=True)
    stub = decode_pb2_grpc.DecodeServiceStub(scene.cluster.channel(scene.cluster.decode[0].grpc))
    error = await failure(stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=f"{PREFILL}:50061")))
    assert error.code == Code.FAILED_PRECONDITION
    for part in ("transport.require: shared_memory", str(scene.sockets), "No such file", "transport.socket_dir"):
        assert part in error.message
    with pytest.raises(StartError) as refused:
        await scene.cluster.gateway.restart()
    assert error.message in str(refused.value)
