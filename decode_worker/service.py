"""DecodeService: one stream for each request, whose end, however it comes, frees what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import grpc
from tandem.v1 import decode_pb2, decode_pb2_grpc, worker_pb2

from decode_worker.scheduler import DecodeScheduler
from decode_worker.stream import DecodeStream
from shared.block_pool import BlockPool
from shared.engine import Engine
from shared.engine_thread import EngineThread
from shared.rpc import handler
from shared.swap_space import SwapSpace
from shared.transport.importer import Importer
from shared.transport.target import target_of
from shared.worker import Site


class DecodeRole(decode_pb2_grpc.DecodeServiceServicer):
    """A decode worker's services over its scheduler."""

    service_names = ("tandem.v1.DecodeService",)

    def __init__(self, site: Site) -> None:
        config, engine = site.config.decode, site.engine
        assert isinstance(engine, Engine)  # the plan of a decode worker refuses a model that embeds
        layout = engine.plan.layout
        pool = BlockPool(
            engine.plan.num_blocks,
            layout.block_tokens,
            prefix_cache=config.prefix_cache,
            model_digest=layout.model_digest,
        )
        self.scheduler = DecodeScheduler(
            engine,
            pool,
            chunk_tokens=config.chunk_tokens,
            batch_tokens=config.batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            swap=SwapSpace(engine.caches, config.swap_memory_mib << 20) if config.preemption == "swap" else None,
            cores=site.cores,
            max_pause_s=config.max_pause_s,
        )
        self._site = site
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self, server: grpc.aio.Server, thread: EngineThread) -> None:
        site = self._site
        self._thread = thread
        self._targets = [target_of(pool) for pool in site.pools]
        self._importer = Importer(
            self._targets,
            worker_id=site.worker_id,
            config=site.config.transport,
            key=site.config.auth.cluster_key,
        )
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    def describe(self, info: worker_pb2.GetInfoResponse) -> None:
        info.role = worker_pb2.WORKER_ROLE_DECODE
        for pair in self._importer.pairs():
            info.peers.add(
                worker_id=pair.worker_id,
                kv_endpoint=pair.kv_endpoint,
                transport=pair.transport,
                refusals=pair.refusals,
            )

    async def close(self) -> None:
        if self._ending:
            await asyncio.wait(self._ending)
        await self._importer.close()
        for target in self._targets:
            target.close()

    @handler
    async def Decode(
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        # given back when the call is done: an end that comes while a message is being sent would reach a `finally` here
        # only once this generator is collected
        lease = ExitStack()
        context.add_done_callback(lambda ctx: lease.close())  # pyright: ignore[reportArgumentType]
        lease.enter_context(self._site.board.admit())
        stream = DecodeStream(self.scheduler, self._thread, self._importer, self._site.limits, self._site.worker_id)
        reader = asyncio.create_task(stream.read(request_iterator))
        lease.callback(self._end, stream, reader)
        async for message in stream.outbox.messages():
            yield message

    @handler
    async def Connect(
        self, request: decode_pb2.ConnectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> decode_pb2.ConnectResponse:
        pair = await self._importer.connect(request.kv_endpoint)
        return decode_pb2.ConnectResponse(
            transport=pair.transport, refusals=pair.refusals, epoch=pair.epoch, prefill_worker_id=pair.worker_id
        )

    def _end(self, stream: DecodeStream, reader: asyncio.Task[None]) -> None:
        """In a task of its own: the call that held the stream is over, and its copies may not be."""
        task = asyncio.create_task(_close(stream, reader))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _close(stream: DecodeStream, reader: asyncio.Task[None]) -> None:
    reader.cancel()
    await asyncio.wait([reader])
    await stream.close()


def create_role(site: Site) -> DecodeRole:
    return DecodeRole(site)
