"""Whether the workers of a cluster fit each other and the configuration, by their own descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tandem.v1 import types_pb2, worker_pb2

from shared.config import TandemConfig
from shared.doctor.finding import Finding, error, ok, warning
from shared.transport.wire import LAYOUT_FIELDS, TRANSPORTS, describe

_ROLES = {worker_pb2.WORKER_ROLE_PREFILL: "prefill", worker_pb2.WORKER_ROLE_DECODE: "decode"}
# What a prefill worker answers one of another host (exporter.py): no transport of one host can be had between them.
_ELSEWHERE = "the workers run on different hosts"

Infos = Mapping[str, worker_pb2.GetInfoResponse]  # by "prefill worker 10.0.0.1:50061", the role being the listed one


def agreements(config: TandemConfig, infos: Infos, digest: str | None) -> Iterator[Finding]:
    """digest: of the model that is here, None where it is not."""
    if infos:
        yield from _roles(infos)
        yield from _models(config, infos, digest)
        yield from _layouts(infos)
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


def _layouts(infos: Infos) -> Iterator[Finding]:
    fields = [name for name in LAYOUT_FIELDS if name not in ("digest", "model_digest")]
    differing = {field: found for field in fields if len(found := _by(_field(infos, field))) > 1}
    if differing:
        text = "; ".join(f"{field}: {_listed(found)}" for field, found in differing.items())
        names = ", ".join(f"`{field}`" for field in differing)
        yield error(
            "layouts", "layouts differ", f"blocks cannot be handed over, for their layouts differ: {text}", fields=names
        )
    else:
        yield ok("layouts", "blocks of all pools are laid out alike")


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
    prefill = {name: info for name, info in infos.items() if info.role == worker_pb2.WORKER_ROLE_PREFILL}
    for name, info in infos.items():
        if info.role != worker_pb2.WORKER_ROLE_DECODE:
            continue
        peers = {peer.worker_id: peer for peer in info.peers}
        for other, described in prefill.items():
            if (peer := peers.get(described.worker_id)) is None:
                text = f"{name} has not shaken hands with {other}, and takes no KV blocks from it yet"
                yield warning("transports", "no handshake", text)
            else:
                yield _transport(config, f"{name} and {other}", peer)


def _transport(config: TandemConfig, pair: str, peer: worker_pb2.Peer) -> Finding:
    name = types_pb2.Transport.Name(peer.transport).removeprefix("TRANSPORT_").lower()
    why = describe(peer.refusals)
    if config.transport.require and peer.transport < TRANSPORTS[config.transport.require]:
        text = f"{pair} hand over by {name}, and transport.require is {config.transport.require}: {why}"
        return error("transports", "below transport.require", text, transport=name)
    if any(refusal.reason != _ELSEWHERE for refusal in peer.refusals):
        # the settings that mend it most often are those of the folder of sockets
        return warning("transports", "slower transport", f"{pair} hand over by {name}, for {why}")
    return ok("transports", f"{pair} hand over by {name}{f' ({why})' if peer.refusals else ''}")


def _field(infos: Infos, field: str) -> dict[str, str]:
    return {name: str(getattr(info.layout, field)) for name, info in infos.items()}


def _by(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> who has it."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _listed(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{value} at {' and '.join(names)}" for value, names in found.items())
