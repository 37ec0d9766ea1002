"""Findings about a running cluster, in one that has everything: workers that fit and workers that do not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import decode_pb2, decode_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

from cli.supervisor import Member
from shared.auth import send_key
from shared.doctor.agreement import agreements
from shared.doctor.cluster import ANSWER_S, cluster
from shared.doctor.finding import Finding, Level
from shared.doctor.surroundings import Surroundings
from shared.rpc import connect
from shared.transport.wire import SHARED_MEMORY, refusal
from tests.cluster import Cluster
from tests.shared.doctor.places import config_of, the

KEY = "swordfish"
BUSY_S = 30.0  # for workers of a host that runs other tests beside this one


@dataclass(frozen=True)
class Running:
    """A pair that fits, a prefill worker without shared memory, and a decode worker that is odd and wants a key."""

    service: Cluster
    slow: Member
    odd: Member
    silent: str  # an address where somebody listens and never answers
    model: Path
    other_model: Path

    def ask(self, *assignments: str, prefill: str, decode: str, **options: Any) -> Any:
        """What the doctor finds with these workers in the lists of its configuration."""
        model = () if any(text.startswith("model=") for text in assignments) else (f"model={self.model}",)
        config = config_of(
            f"gateway.port={self.service.grpc_target.rpartition(':')[2]}",
            f"gateway.prefill_workers={prefill}",
            f"gateway.decode_workers={decode}",
            *model,
            *assignments,
        )
        return cluster(Surroundings(config, nvml=None), **{"answer_s": BUSY_S, **options})


@pytest.fixture(scope="module")
def listening() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
async def running(tiny_model: Callable[[str], Path], listening: str) -> AsyncIterator[Running]:
    model = tiny_model("llama")
    async with Cluster(model=str(model), settings={"threads": 1}) as service:
        slow, odd = await asyncio.gather(
            service.add_prefill({"transport.disable": ["shared_memory"]}),
            service.add_decode({"dtype": "float32", "served_name": "odd", "auth.cluster_key": KEY}),
        )
        decode: Any = decode_pb2_grpc.DecodeServiceStub(service.channel(service.decode[0].grpc))
        await decode.Connect(decode_pb2.ConnectRequest(kv_endpoint=slow.grpc))
        yield Running(service, slow, odd, listening, model, tiny_model("llama-gelu"))


# kind -> (level, a part of the message, a part of the remedy), of workers that do not fit
PROVOKED: dict[str, tuple[Level, str, str]] = {
    "no answer": ("error", "decode worker {silent} does not answer: ", "decode:\n    host: 0.0.0.0"),
    "address unknown": ("error", "gateway.decode_workers names a..b:1", "getent hosts a..b"),
    "not a worker": ("error", "decode worker {gateway} answers, and is none", "gateway.decode_workers"),
    "key refused": ("error", "decode worker {odd} does not take", "cluster_key: ..."),
    "other role": ("error", "prefill worker {decode} is a decode worker", "list it in gateway.decode_workers"),
    "slower transport": ("warning", "by inline, for shared_memory: the prefill worker's transport.disable", "sockets:"),
}


@pytest.fixture(scope="module")
async def misfits(running: Running) -> list[Finding]:
    service = running.service
    decode = [service.decode[0].grpc, running.odd.grpc, running.silent, service.grpc_target, "a..b:1"]
    prefill = [service.prefill[0].grpc, running.slow.grpc, service.decode[0].grpc]
    return await running.ask(prefill=",".join(prefill), decode=",".join(decode), answer_s=2 * ANSWER_S)


@pytest.mark.parametrize("kind", PROVOKED)
async def test_each_finding_is_provoked(kind: str, misfits: list[Finding], running: Running) -> None:
    level, message, remedy = PROVOKED[kind]
    service = running.service
    names = {"silent": running.silent, "odd": running.odd.grpc, "gateway": service.grpc_target}
    # the decode worker is in both lists, so what is said of it as a decode worker is said twice
    finding = next(finding for finding in misfits if finding.kind == kind)
    assert finding.level == level
    assert message.format(**names, decode=service.decode[0].grpc) in finding.message
    assert remedy in finding.remedy


async def test_a_cluster_with_nothing_amiss(running: Running) -> None:
    service = running.service
    findings = await running.ask(prefill=service.prefill[0].grpc, decode=service.decode[0].grpc)
    assert {finding.level for finding in findings} == {"ok"}, findings
    texts = {finding.check: finding.message for finding in findings}
    assert set(texts) == {"answers", "models", "layouts", "worker versions", "transports"}
    assert "as the files here" in texts["models"]
    assert "hand over by shared_memory" in texts["transports"]
    assert len([finding for finding in findings if finding.check == "answers"]) == 3


PROVOKED_BY_PAIRS = {"models differ", "layouts differ", "no handshake", "below transport.require"}


async def test_workers_that_do_not_fit_each_other(running: Running) -> None:
    service = running.service
    findings = await running.ask(
        f"auth.cluster_key={KEY}",
        "transport.require=shared_memory",
        prefill=running.slow.grpc,
        decode=f"{service.decode[0].grpc},{running.odd.grpc}",
    )
    assert {finding.kind for finding in findings if finding.kind} == PROVOKED_BY_PAIRS
    models = the(findings, "models differ")
    assert models.level == "error"
    assert f"at decode worker {running.odd.grpc}" in models.message
    assert "odd (" in models.message
    assert "`quantization`" in models.remedy
    layouts = the(findings, "layouts differ")
    assert layouts.level == "error"
    assert f"prefill worker {running.slow.grpc} and decode worker {running.odd.grpc} hand nothing" in layouts.message
    assert "dtype is 'bfloat16' on prefill and 'float32' on decode" in layouts.message
    assert "convert_dtype: true" in layouts.remedy
    handshake = the(findings, "no handshake")
    assert handshake.level == "warning"
    assert running.odd.grpc in handshake.message
    assert "start the gateway" in handshake.remedy
    required = the(findings, "below transport.require")
    assert required.level == "error"
    assert "transport.disable names it" in required.message
    assert "require: inline" in required.remedy
    assert not any(KEY in finding.message + finding.remedy for finding in findings)


PROVOKED_HERE = "model differs here"


async def test_another_model_on_this_host(running: Running) -> None:
    workers = {"prefill": running.service.prefill[0].grpc, "decode": running.service.decode[0].grpc}
    finding = the(await running.ask(f"model={running.other_model}", **workers), PROVOKED_HERE)
    assert finding.level == "error"
    assert "tiny-llama-0" in finding.message
    assert "tiny-llama-gelu-0" in finding.message
    assert "`model`" in finding.remedy
    renamed = the(await running.ask("served_name=other", **workers), PROVOKED_HERE)
    assert "this host's configuration and files are other" in renamed.message
    elsewhere = await running.ask("model=not-here", "served_name=tiny-llama-0", **workers)
    assert {finding.level for finding in elsewhere} == {"ok"}, "nothing to compare with"


PROVOKED_BY_VERSION = "versions differ"


async def test_another_version_and_another_host(running: Running) -> None:
    service = running.service
    infos = {
        f"prefill worker {service.prefill[0].grpc}": await service.info(service.prefill[0]),
        f"decode worker {service.decode[0].grpc}": await service.info(service.decode[0]),
    }
    [prefill, decode] = infos.values()
    decode.versions["torch"] = "1.0"
    [peer] = [peer for peer in decode.peers if peer.worker_id == prefill.worker_id]
    peer.transport = types_pb2.TRANSPORT_INLINE
    peer.refusals.append(refusal(SHARED_MEMORY, "the workers run on different hosts"))
    config = config_of(f"model={running.model}")
    findings = list(agreements(config, infos, None))
    finding = the(findings, PROVOKED_BY_VERSION)
    assert finding.level == "warning"
    assert "torch " in finding.message
    assert f"1.0 at decode worker {service.decode[0].grpc}" in finding.message
    assert "make setup" in finding.remedy
    [transport] = [finding for finding in findings if finding.check == "transports"]
    assert transport.level == "ok", "nothing better can be had between two hosts"


async def test_a_name_with_two_addresses_for_a_worker(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """localhost is 127.0.0.1 and ::1 on most hosts, and a worker listens on the one."""
    loop, service = asyncio.get_running_loop(), running.service
    resolve = loop.getaddrinfo

    async def both(host: str, port: int, **options: Any) -> Any:
        found = await resolve("127.0.0.1" if host == "twofold" else host, port, **options)
        return (
            [*found, (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))] if host == "twofold" else found
        )

    monkeypatch.setattr(loop, "getaddrinfo", both)
    port = service.prefill[0].grpc.rpartition(":")[2]
    findings = await running.ask(prefill=f"twofold:{port}", decode=service.decode[0].grpc)
    assert {finding.level for finding in findings} == {"ok"}, findings
    silent = await running.ask(prefill="twofold:1", decode=service.decode[0].grpc)
    assert [finding.kind for finding in silent if finding.kind] == ["no answer"] * 2


async def test_nobody_there_is_no_finding_unless_a_cluster_is_asked_for(running: Running) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
        flags = {"prefill": nobody, "decode": nobody}
        gateway = f"gateway.port={nobody.rpartition(':')[2]}"
        assert await running.ask(gateway, **flags, must_answer=False) == []
        findings = await running.ask(gateway, **flags)
    assert [finding.kind for finding in findings] == ["no answer"] * 3
    assert "Connection refused" in findings[0].message


PROVOKED_BY_DRAINING = "not serving"


async def test_a_worker_that_drains(running: Running) -> None:
    service, odd = running.service, running.odd
    async with connect(
        odd.grpc, interceptors=send_key(config_of(f"auth.cluster_key={KEY}").auth.cluster_key)
    ) as channel:
        worker: Any = worker_pb2_grpc.WorkerServiceStub(channel)
        await worker.Drain(worker_pb2.DrainRequest())
        health: Any = health_pb2_grpc.HealthStub(channel)
        async for state in health.Watch(health_pb2.HealthCheckRequest(), timeout=30):
            if state.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    findings = await running.ask(f"auth.cluster_key={KEY}", prefill=service.prefill[0].grpc, decode=odd.grpc)
    finding = the(findings, PROVOKED_BY_DRAINING)
    assert finding.level == "error"
    assert f"decode worker {odd.grpc} answers, and its health is NOT_SERVING" in finding.message
    assert "start it again" in finding.remedy
