"""`tandem up`: the model, then prefill workers, decode workers and the gateway as processes, until Ctrl-C."""

from __future__ import annotations

import asyncio
import shlex
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.client import DEFAULT_ADDRESS, reachable
from cli.models import ensure_model
from cli.process import StartError
from cli.supervisor import Member, Supervisor
from shared.arguments import parse_overrides
from shared.config import TandemConfig, load_config
from shared.model_store import ModelStore
from shared.policies.table import embeds

STOP_MARGIN_S = 10.0
READY_S = 600.0  # large weights on a slow disk; a process that dies is noticed at once
PROMPT = "The capital of France is"
ANY_PORT = ("gateway.port=0", "gateway.http_port=0", "prefill.port=0", "decode.port=0")


def run(config_path: Path | None, assignments: Sequence[str]) -> None:
    """Serves until SIGINT or SIGTERM; a second one does not wait for running requests.

    assignments: `key.path=value` from flags, the later of two wins.
    Raises ConfigError, ModelError, and StartError when a process does not come up.
    """
    overrides = parse_overrides(assignments)
    config = load_config(config_path, overrides)
    # by the name under which every process then finds it without a network
    model = ensure_model(config.model, allow_pickle=config.allow_pickle)
    vectors = embeds(ModelStore().resolve(model, allow_pickle=config.allow_pickle).config)
    if vectors and not config.up.prefill:
        raise StartError("up.prefill: 0, and a model that embeds texts is served by prefill workers alone; set 1")
    check_ports(config, vectors=vectors)
    asyncio.run(_serve(config_path, config, {**_flatten(overrides), "model": model}, vectors=vectors))


def worker_ports(config: TandemConfig, *, vectors: bool = False) -> tuple[list[int], list[int]]:
    """Ports of the prefill and the decode workers: counted up from the configured one, or all 0.

    vectors: of a model that embeds, which has no decode workers.
    """
    first, count = config.prefill.port, config.up.prefill
    prefill = [first and first + i for i in range(count)]
    first, count = config.decode.port, 0 if vectors else config.up.decode
    return prefill, [first and first + i for i in range(count)]


def check_ports(config: TandemConfig, *, vectors: bool = False) -> None:
    """Raises StartError naming a port that another program has."""
    prefill, decode = worker_ports(config, vectors=vectors)
    wanted = [
        ("gateway.port", config.gateway.host, config.gateway.port),
        ("gateway.http_port", config.gateway.host, config.gateway.http_port),
        *(("prefill.port", config.prefill.host, port) for port in prefill),
        *(("decode.port", config.decode.host, port) for port in decode),
    ]
    taken: dict[int, str] = {}
    for key, host, port in wanted:
        if port and port in taken:
            raise StartError(f"port {port} is wanted twice, by {taken[port]} and {key}; set one of them to another")
        taken[port] = key
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise StartError(
                    f"{key}: {host}:{port} cannot be used ({error.strerror}); "
                    f"name another with --set {key}=N, or take free ones with --port 0"
                ) from None


async def _serve(config_path: Path | None, config: TandemConfig, settings: Mapping[str, Any], *, vectors: bool) -> None:
    started = time.monotonic()
    stop = asyncio.Event()
    supervisor = Supervisor(
        settings=settings,
        config_path=config_path,
        revive=True,
        ready_s=READY_S,
        grace_s=config.drain_s + STOP_MARGIN_S,
    )

    def on_signal() -> None:
        if stop.is_set():
            supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    async with supervisor:
        start = asyncio.create_task(_start(supervisor, config, vectors=vectors))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            print(_ready_text(config, start.result(), time.monotonic() - started, vectors=vectors), flush=True)
            await stopped
        start.cancel()
        stopped.cancel()
        await asyncio.wait({start, stopped})


async def _start(supervisor: Supervisor, config: TandemConfig, *, vectors: bool) -> Member:
    """Workers all at once, then the gateway, which is told of them."""
    prefill, decode = worker_ports(config, vectors=vectors)
    try:
        async with asyncio.TaskGroup() as group:
            for port in prefill:
                group.create_task(supervisor.start("prefill_worker", {"prefill.port": port}))
            for port in decode:
                group.create_task(supervisor.start("decode_worker", {"decode.port": port}))
    except* StartError as errors:
        raise errors.exceptions[0] from None
    return await supervisor.start("gateway")


def _ready_text(config: TandemConfig, gateway: Member, start_s: float, *, vectors: bool) -> str:
    address = reachable(gateway.grpc)
    flag = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    http = reachable(gateway.http or "")
    if vectors:
        route, body, command = "embeddings", f'{{"input": "{PROMPT}"}}', ""
    else:
        route, body = "completions", f'{{"prompt": "{PROMPT}", "max_tokens": 32}}'
        command = f'  ./tandem generate "{PROMPT}"{flag}\n'
    return f"""
Tandem is ready: {config.model_name} at gRPC {gateway.grpc} and HTTP {gateway.http}, after {start_s:.1f} s. Try

{command}  curl http://{http}/v1/{route} -H 'content-type: application/json' -d {shlex.quote(body)}

Ctrl-C stops it."""


def _flatten(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
