"""The gateway process: `python -m gateway [--config PATH] [--set KEY.PATH=VALUE ...]`.

When it can serve it prints one line of JSON to standard output; logs go to standard error. SIGTERM and SIGINT stop it:
requests in progress get `drain_s` seconds, then they are cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from tandem.v1 import inference_pb2_grpc

from gateway.gateway import Gateway
from gateway.http import create_app
from gateway.metrics import Metrics
from gateway.model import ServedModel
from gateway.service import SERVICE_NAME, InferenceService
from gateway.workers import StartError
from shared.address import bracketed
from shared.arguments import die_with_parent, parse_arguments
from shared.auth import Access, RequireKey
from shared.chat_template import ChatTemplateError
from shared.config import TandemConfig
from shared.logs import configure_logs
from shared.model_files import ModelError
from shared.model_store import ModelStore
from shared.rpc import Health, create_server

log = logging.getLogger(__name__)

_CLOSE_S = 1.0  # how long streams that were cancelled have to tell their clients so


def main() -> int:
    """The exit status: 0 after a signal, 1 if the gateway cannot start."""
    arguments = parse_arguments("gateway")
    if arguments.die_with_parent:
        die_with_parent()
    configure_logs(arguments.config.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until the event loop takes them over
    try:
        files = ModelStore().resolve(arguments.config.model, allow_pickle=arguments.config.allow_pickle)
        model = ServedModel.load(arguments.config.model_name, files, arguments.config.weights_form)
        asyncio.run(serve(arguments.config, model))
    except (ModelError, ChatTemplateError, StartError, OSError, RuntimeError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(config: TandemConfig, model: ServedModel) -> None:
    """Serves until a signal comes. Raises StartError if the workers do not fit; OSError, RuntimeError for the ports."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    access = Access(config.auth.api_keys)
    server = create_server(config.gateway.max_message_bytes, [RequireKey(access)])
    port = server.add_insecure_port(f"{bracketed(config.gateway.host)}:{config.gateway.port}")
    with _listen(config.gateway.host, config.gateway.http_port) as http_socket:
        async with Gateway(config, model, Metrics()) as gateway:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway, access), server)
            health = Health(server, [SERVICE_NAME])
            if not await _unless(stop, gateway.ready()):
                return
            app = create_app(gateway, access, max_body_bytes=config.gateway.max_message_bytes)
            web = _WebServer(app)
            await server.start()
            async with asyncio.TaskGroup() as group:
                web_task = group.create_task(web.serve(sockets=[http_socket]))
                health_task = group.create_task(_keep_truthful(health, gateway))
                _print_ready(config, gateway, port, http_socket.getsockname()[1])
                await stop.wait()
                log.info("stopping: %d requests have %g s to end", gateway.num_requests, config.drain_s)
                health_task.cancel()
                await health.set(False)
                await gateway.drain(config.drain_s)
                await gateway.cancel()
                web.should_exit = True
                await asyncio.gather(web_task, server.stop(_CLOSE_S))


async def _unless(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Whether `work` came to its end before the signal to stop."""
    working, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def _keep_truthful(health: Health, gateway: Gateway) -> None:
    """Health follows the workers."""
    while True:
        serving = gateway.serving
        await health.set(serving)
        if serving == gateway.serving:  # it may have changed in the meantime
            await gateway.workers.changes.next()


class _WebServer(uvicorn.Server):
    """uvicorn in a loop that is not its own: signals are the process's."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=int(_CLOSE_S)
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listener:
        yield listener


def _print_ready(config: TandemConfig, gateway: Gateway, port: int, http_port: int) -> None:
    host = bracketed(config.gateway.host)
    line = {
        "event": "ready",
        "role": "gateway",
        "grpc": f"{host}:{port}",
        "http": f"{host}:{http_port}",
        "pid": os.getpid(),
        "worker_id": gateway.gateway_id,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
