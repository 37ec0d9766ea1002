"""What both kinds of workers have in common: a bound port, a loaded engine on its thread, health, an orderly end.

server = await WorkerServer.start(config, config.decode, create_decode_role)
print(server.address)
await server.stop(drain_s=5)
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc
from tandem.v1 import worker_pb2, worker_pb2_grpc

from shared.address import bracketed, reachable
from shared.arguments import Arguments, die_with_parent
from shared.auth import Access, RequireKey
from shared.config import ApiKey, ConfigError, DecodeConfig, PrefillConfig, TandemConfig
from shared.cores import Cores
from shared.engine_thread import EngineThread, Scheduler
from shared.kv_cache import KvLayout
from shared.load_board import LoadBoard
from shared.logs import configure_logs
from shared.model_files import ModelError
from shared.rpc import Health, RpcError, create_server
from shared.token_request import Limits
from shared.transport.wire import layout_to_proto
from shared.worker_engine import Loaded, load_engine
from shared.worker_service import WorkerService

log = logging.getLogger(__name__)

WORKER_SERVICE = "tandem.v1.WorkerService"
# A loop that has not turned for so long is wedged: far above a step, far below what a client waits.
WEDGED_AFTER_S = 10.0
HEALTH_INTERVAL_S = 0.5


class Role(Protocol):
    """What makes a worker a prefill or a decode worker."""

    @property
    def scheduler(self) -> Scheduler: ...

    @property
    def service_names(self) -> Sequence[str]: ...

    async def start(self, server: grpc.aio.Server, thread: EngineThread) -> None:
        """Adds its services to the server."""
        ...

    def describe(self, info: worker_pb2.GetInfoResponse) -> None:
        """Fills in what only the role knows."""
        ...

    async def close(self) -> None:
        """After the last RPC: waits until everything is handed back, then lets go of memory, sockets and channels."""
        ...


class Site:
    """Where a role runs: its engine, its address, and what it shares with the services beside it."""

    def __init__(
        self,
        config: TandemConfig,
        loaded: Loaded,
        worker_id: str,
        address: str,
    ) -> None:
        self.config = config
        engine, pools = self.engine, self.pools = loaded.engine, loaded.pools
        self.followers, self.group = loaded.followers, loaded.group
        # of the worker, whichever heads a rank has
        self.layout = KvLayout.joined([pool.layout for pool in pools]) if pools else engine.plan.layout
        self.worker_id = worker_id
        self.address = address  # host:port at which others reach this worker
        self.board = LoadBoard()
        # a device of one's own is not shared out by turns
        self.cores = Cores.join() if engine.plan.device == "cpu" else Cores()
        self.limits = Limits(
            model=config.model_name,
            vocab_size=engine.plan.architecture.vocab_size,
            max_context=engine.plan.max_context,
            block_tokens=engine.plan.layout.block_tokens,
            num_blocks=engine.plan.num_blocks - 1,
        )

    async def abandon(self) -> None:
        """Ends the other ranks, if any, and what this one waits for them in."""
        if self.followers is not None:
            self.followers.kill()
        if self.group is not None:
            await asyncio.to_thread(self.group.abort)


class WorkerServer:
    """A running worker. `failed` is done, with the exception, once the engine thread's state is unknown."""

    def __init__(self, site: Site, role: Role, server: grpc.aio.Server) -> None:
        self.address = site.address
        self.worker_id = site.worker_id
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._site = site
        self._role = role
        self._server = server
        self._thread = EngineThread(role.scheduler, on_load=site.board.publish, on_failure=self._fail)
        self._health = Health(server, [*role.service_names, WORKER_SERVICE])
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: TandemConfig, section: PrefillConfig | DecodeConfig, create_role: Callable[[Site], Role]
    ) -> WorkerServer:
        """Binds the port, loads the model, warms up, serves.

        section: that of the role. Raises ModelError, ConfigError, RpcError for a transport that cannot be had,
        RuntimeError for a port in use.
        """
        key = config.auth.cluster_key
        server = create_server(
            interceptors=[RequireKey(Access([ApiKey(name="cluster", key=key)]))] if key is not None else []
        )
        field = f"{'prefill' if isinstance(section, PrefillConfig) else 'decode'}.host"
        told = reachable(section.host, field)
        listen = f"{bracketed(section.host)}:{section.port}"
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise RuntimeError(
                f"{field}: {listen} cannot be listened on ({error}); it must be an address of this host, or a name of "
                "one, with a free port; 0.0.0.0 or :: = all of them"
            ) from None
        address = f"{bracketed(told)}:{port}"
        followers = None
        try:
            loaded = await asyncio.to_thread(load_engine, config, section)
            followers = loaded.followers
            worker_id = f"{type(section).__name__[0].lower()}-{secrets.token_hex(6)}"
            site = Site(config, loaded, worker_id, address)
            worker = cls(site, create_role(site), server)
            await worker._serve()
        except BaseException:
            await server.stop(None)
            if followers is not None:
                followers.unwatch()
                followers.stop(orderly=False)
            raise
        return worker

    @property
    def description(self) -> str:
        """What it computes with."""
        engine = self._site.engine
        return f"{engine.description}, activations of {engine.workspace_bytes / (1 << 20):.1f} MiB"

    async def stop(self, drain_s: float) -> None:
        """Admits no more requests, gives those that run `drain_s` seconds, ends the rest and hands everything back."""
        self._site.board.drain()
        followers = self._site.followers
        if self.failed.done():
            await self._site.abandon()  # the engine thread may wait for one of them
        if self._watch:
            self._watch.cancel()
        await self._health.set(False)
        idle = asyncio.ensure_future(self._site.board.idle())
        await asyncio.wait([idle, self.failed], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            idle.cancel()
            log.warning("%d requests did not end within %g s and are cut off", self._site.board.running, drain_s)
        await self._server.stop(0.1)
        await self._role.close()
        is_lost = self.failed.done() or self._thread.silent_s > WEDGED_AFTER_S
        if followers is not None:
            followers.unwatch()
            if is_lost:
                await self._site.abandon()
        await self._thread.stop()
        self._site.cores.leave()
        if followers is not None:
            await asyncio.to_thread(followers.stop, orderly=not is_lost)
        self._site.engine.close()
        for pool in self._site.pools:
            pool.close()

    async def _serve(self) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(self._info, self._site.board), self._server)
        await self._role.start(self._server, self._thread)
        self._thread.start()
        if self._site.followers is not None:
            self._site.followers.watch(self._fail)
        await self._health.set(True)
        self._watch = asyncio.create_task(self._watch_health())
        await self._server.start()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            log.error("this worker has failed: %s", error)
            self.failed.set_exception(error)

    def _info(self) -> worker_pb2.GetInfoResponse:
        plan = self._site.engine.plan
        info = worker_pb2.GetInfoResponse(
            worker_id=self.worker_id,
            model=self._site.limits.model,
            family=plan.architecture.family,
            max_context=plan.max_context,
            vocab_size=plan.architecture.vocab_size,
            layout=layout_to_proto(self._site.layout),
            device=plan.device,
            dtype=plan.dtype,
            num_blocks=self._site.limits.num_blocks,
            max_running=plan.max_running,
            tp=max(1, len(self._site.pools)),
        )
        self._role.describe(info)
        return info

    async def _watch_health(self) -> None:
        """Draining is NOT_SERVING too: nothing new is to be sent here."""
        while True:
            wedged = self._thread.silent_s > WEDGED_AFTER_S
            await self._health.set(not (wedged or self._site.board.draining))
            await asyncio.sleep(HEALTH_INTERVAL_S)


def run_worker(
    role: str, arguments: Arguments, section: PrefillConfig | DecodeConfig, create_role: Callable[[Site], Role]
) -> None:
    """The life of a worker process, from the arguments to its exit status: 0 after SIGTERM, 1 after a failure."""
    gc.freeze()  # what was imported stays: no collection has to walk over it
    gc.enable()
    configure_logs(arguments.config.log_level)
    if arguments.die_with_parent:
        die_with_parent()
    status = asyncio.run(_run(role, arguments.config, section, create_role))
    logging.shutdown()
    sys.stdout.flush()
    # all is handed back by now; taking torch apart, as the interpreter's own end does, costs half a second
    os._exit(status)


async def _run(
    role: str, config: TandemConfig, section: PrefillConfig | DecodeConfig, create_role: Callable[[Site], Role]
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    starting = asyncio.create_task(WorkerServer.start(config, section, create_role))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    try:
        worker = await starting
    except (ModelError, ConfigError, RpcError, RuntimeError, OSError, MemoryError) as error:
        log.error("%s cannot start: %s", role, error)
        return 1
    if stop.is_set():
        await worker.stop(drain_s=0)
        return 0
    ready = {"event": "ready", "role": role, "grpc": worker.address, "http": None}
    print(json.dumps({**ready, "pid": os.getpid(), "worker_id": worker.worker_id}), flush=True)
    log.info("%s serves %s at %s, ops in %s", role, config.model_name, worker.address, worker.description)
    await asyncio.wait([stopping, worker.failed], return_when=asyncio.FIRST_COMPLETED)
    if worker.failed.done():
        # the state is unknown: no request may go on with it
        worker.failed.exception()
        await worker.stop(drain_s=0)
        return 1
    await worker.stop(config.drain_s)
    return 0
