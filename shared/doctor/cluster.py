"""A running cluster: every worker of the configuration's lists, and the gateway, asked for what they are."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tandem.v1 import worker_pb2, worker_pb2_grpc

from shared.address import bracketed
from shared.auth import send_key
from shared.config import TandemConfig
from shared.doctor.agreement import agreements
from shared.doctor.finding import Finding, error, ok
from shared.doctor.surroundings import Surroundings
from shared.model_files import ModelError, ModelFiles
from shared.model_store import ModelStore
from shared.policies.table import embeds
from shared.rpc import connect

ANSWER_S = 2.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Listed:
    """An address of the configuration. role: gateway, prefill or decode."""

    role: str
    target: str  # as it is configured
    address: str  # host:port, its name resolved

    @property
    def key(self) -> str:
        """Where the configuration has it, below `gateway`."""
        return "port" if self.role == "gateway" else f"{self.role}_workers"

    @property
    def is_version_6(self) -> bool:
        return self.address.startswith("[")

    def __str__(self) -> str:
        return f"{self.role if self.role == 'gateway' else f'{self.role} worker'} {self.address}"


@dataclass(frozen=True)
class Answer:
    """What an address said. Without `info` it is a gateway, or `failure` says why nothing is known."""

    listed: Listed
    serving: bool = False
    info: worker_pb2.GetInfoResponse | None = None
    failure: grpc.aio.AioRpcError | None = None


async def cluster(surroundings: Surroundings, *, must_answer: bool = True, answer_s: float = ANSWER_S) -> list[Finding]:
    """must_answer: whether a cluster of which nobody answers is an error; else it is none, and there is no finding."""
    config = surroundings.config
    files = await asyncio.to_thread(_local_files, config)
    vectors = files is not None and embeds(files.config)
    listed, unknown = await _resolve(config, vectors=vectors)
    answers = _reached(await asyncio.gather(*(_ask(each, config.auth.cluster_key, answer_s) for each in listed)))
    heard = [answer for answer in answers if not _is_silent(answer)]
    if not heard and not must_answer:
        return []
    findings = [*unknown, *(finding for answer in answers for finding in _answered(answer))]
    infos = {str(answer.listed): answer.info for answer in heard if answer.info is not None}
    digest = None if files is None else files.digest_as(config.weights_form)
    return [*findings, *agreements(config, infos, digest)]


async def _resolve(config: TandemConfig, *, vectors: bool) -> tuple[list[Listed], list[Finding]]:
    """Every address that the configured names stand for, and a finding for each name that nobody knows.

    vectors: of a model that embeds, which has no decode workers.
    """
    gateway = config.gateway
    targets = [("gateway", f"{bracketed(_EVERYWHERE.get(gateway.host, gateway.host))}:{gateway.port}")]
    targets += [("prefill", target) for target in gateway.prefill_workers]
    if not vectors:
        targets += [("decode", target) for target in gateway.decode_workers]
    listed: list[Listed] = []
    unknown: list[Finding] = []
    for role, target in targets:
        host, _, port = target.rpartition(":")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as refused:  # UnicodeError: what cannot be a name at all
            key = Listed(role, target, target).key
            text = f"gateway.{key} names {target}, and that is no address: {refused}"
            unknown.append(error("answers", "address unknown", text, key=key, host=host))
            continue
        addresses = sorted({bracketed(str(name[0])) for *_, name in found})
        listed += [Listed(role, target, f"{address}:{port}") for address in addresses]
    return listed, unknown


async def _ask(listed: Listed, key: SecretStr | None, answer_s: float) -> Answer:
    async with connect(listed.address, interceptors=send_key(key)) as channel:
        try:
            health: Any = health_pb2_grpc.HealthStub(channel)
            check = await health.Check(health_pb2.HealthCheckRequest(), timeout=answer_s)
            serving = check.status == _SERVING
            if listed.role == "gateway":
                return Answer(listed, serving)
            service: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[assignment]
            return Answer(listed, serving, await service.GetInfo(worker_pb2.GetInfoRequest(), timeout=answer_s))
        except grpc.aio.AioRpcError as failure:
            return Answer(listed, failure=failure)


def _reached(answers: Sequence[Answer]) -> list[Answer]:
    """Without the silent addresses of a name's one family where those of its other family answer: such a name, as
    localhost is, has two addresses for each worker, and the worker need not listen on both."""
    families = {(each.listed.target, each.listed.is_version_6) for each in answers if not _is_silent(each)}
    return [
        each
        for each in answers
        if not _is_silent(each)
        or (each.listed.target, each.listed.is_version_6) in families
        or (each.listed.target, not each.listed.is_version_6) not in families
    ]


def _is_silent(answer: Answer) -> bool:
    codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return answer.failure is not None and answer.failure.code() in codes


def _answered(answer: Answer) -> Sequence[Finding]:
    listed, failure = answer.listed, answer.failure
    if failure is None:
        if answer.serving:
            return [ok("answers", f"{listed} serves")]
        return [
            error("answers", "not serving", f"{listed} answers, and its health is NOT_SERVING: it takes no request")
        ]
    if failure.code() == grpc.StatusCode.UNAUTHENTICATED:
        return [error("answers", "key refused", f"{listed} does not take this configuration's auth.cluster_key")]
    if failure.code() == grpc.StatusCode.UNIMPLEMENTED:
        text = f"{listed} answers, and is none: another service listens there"
        return [error("answers", "not a worker", text, key=listed.key, role=listed.role)]
    # gRPC's own words end with what the kernel said
    text = f"{listed} does not answer: {(failure.details() or failure.code().name).rpartition('last error: ')[2]}"
    return [error("answers", "no answer", text, section=listed.role)]


def _local_files(config: TandemConfig) -> ModelFiles | None:
    """The configured model's, None where they are not here."""
    try:
        return ModelStore().resolve(config.model, allow_pickle=config.allow_pickle)
    except ModelError:
        return None
