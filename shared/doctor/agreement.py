"""Whether the workers of a cluster fit each other and the configuration, by their own descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from tandem.v1 import types_pb2, worker_pb2

from shared.config import TandemConfig
from shared.doctor.finding import Finding, error, ok, warning
from shared.rpc import RpcError
from shared.transport.wire import CUDA_IPC, TRANSPORTS, check_layouts, describe

PREFILL, DECODE = worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE
_ROLES = {PREFILL: "prefill", DECODE: "decode"}
# What a prefill worker answers one of another host (exporter.py): no transport of one host can be had between them.
_ELSEWHERE = "the workers run on different hosts"

Infos = Mapping[str, worker_pb2.GetInfoResponse]  # by "prefill worker 10.0.0.1:50061", the role being the listed one


def agreements(config: TandemConfig, infos: Infos, digest: str | None) -> Iterator[Finding]:
    """digest: of the model that is here, None where it is not."""
    if infos:
        yield from _roles(infos)
        yield from _models(config, infos, digest)
        yield from _layouts(config, infos)
        yield from _versions(infos)
        yield from _transports(config, infos)


def _roles(infos: Infos) -> Iterator[Finding]:
    for name, info in infos.items():
        role = _ROLES.get(info.role, "unknown")
        if not name.startswith(role):
            text = f"{name} is a {role} worker, {info.worker_id}"
            yield error("roles", "other role", text, key=f"{role}_workers")


def _models(config: TandemConfig, infos: Infos, digest: str | None) -> Iterator[Finding]:
    found = _by({name: f"{info.model} ({info.layout.model_digest[:12]}…)" for name, info in infos.items()})
    if len(found) > 1:
        yield error("models", "models differ", f"the workers have different models: {_listed(found)}")
        return
    info = next(iter(infos.values()))
    if (digest and digest != info.layout.model_digest) or info.model != config.model_name:
        here = f"{config.model_name} ({digest[:12]}…)" if digest else config.model_name
        text = f"the workers serve {next(iter(found))}, and this host's configuration and files are {here}"
        yield error("models", "model differs here", text)
    else:
        yield ok("models", f"all serve {next(iter(found))}{', as the files here' if digest else ''}")


def _layouts(config: TandemConfig, infos: Infos) -> Iterator[Finding]:
    amiss = False
    for (prefill, source), (decode, target) in product(_of(infos, PREFILL), _of(infos, DECODE)):
        if source.layout.model_digest != target.layout.model_digest:
            continue  # other blocks altogether, which the check of models tells
        try:
            check_layouts(source.layout, target.layout, converts_dtype=config.transport.convert_dtype)
        except RpcError as refused:
            amiss = True
            yield error("layouts", "layouts differ", f"{prefill} and {decode} hand nothing over: {refused.message}")
    if not amiss and not any(info.embedding_size for info in infos.values()):
        yield ok("layouts", "every decode worker can take the blocks of every prefill worker")


def _versions(infos: Infos) -> Iterator[Finding]:
    names = sorted({name for info in infos.values() for name in info.versions})
    versions = {name: _by({who: info.versions.get(name, "none") for who, info in infos.items()}) for name in names}
    differing = {name: found for name, found in versions.items() if len(found) > 1}
    if differing:
        text = "; ".join(f"{name} {_listed(found)}" for name, found in differing.items())
        yield warning("worker versions", "versions differ", f"the same bits are promised among equals alone: {text}")
    else:
        yield ok("worker versions", ", ".join(f"{name} {next(iter(found))}" for name, found in versions.items()))


def _transports(config: TandemConfig, infos: Infos) -> Iterator[Finding]:
    for (prefill, source), (decode, target) in product(_of(infos, PREFILL), _of(infos, DECODE)):
        peer = next((peer for peer in target.peers if peer.worker_id == source.worker_id), None)
        if peer is None:
            text = f"{decode} has not shaken hands with {prefill}, and takes no KV blocks from it yet"
            yield warning("transports", "no handshake", text)
        else:
            on_gpus = source.device.startswith("cuda") and target.device.startswith("cuda")
            yield _transport(config, f"{decode} and {prefill}", peer, on_gpus)


def _transport(config: TandemConfig, pair: str, peer: worker_pb2.Peer, on_gpus: bool) -> Finding:
    name = types_pb2.Transport.Name(peer.transport).removeprefix("TRANSPORT_").lower()
    if config.transport.require and peer.transport < TRANSPORTS[config.transport.require]:
        text = f"{pair} hand over by {name}, and transport.require is {config.transport.require}"
        return error("transports", "below transport.require", f"{text}: {describe(peer.refusals)}", transport=name)
    # what two hosts, or pools that are not on GPUs, cannot have is not amiss
    amiss = [r for r in peer.refusals if r.reason != _ELSEWHERE and (on_gpus or r.transport != CUDA_IPC)]
    if amiss:
        # most often mended by the settings of the folder of sockets
        return warning("transports", "slower transport", f"{pair} hand over by {name}, for {describe(amiss)}")
    return ok("transports", f"{pair} hand over by {name}{f' ({describe(peer.refusals)})' if peer.refusals else ''}")


def _of(infos: Infos, role: worker_pb2.WorkerRole.ValueType) -> list[tuple[str, worker_pb2.GetInfoResponse]]:
    """The workers that say that they have the role."""
    return [(name, info) for name, info in infos.items() if info.role == role]


def _by(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> who has it."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _listed(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{value} at {' and '.join(names)}" for value, names in found.items())
