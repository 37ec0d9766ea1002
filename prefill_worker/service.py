"""PrefillService: one stream for each prompt, whose end, however it comes, frees what it holds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import grpc
from tandem.v1 import kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2

from prefill_worker.embed_service import EmbedRole, refuses_to_embed
from prefill_worker.prompt import Computed, Done, Event, Failed, Prompt
from prefill_worker.scheduler import PrefillScheduler
from shared.block_pool import BlockPool
from shared.engine import EncoderEngine, Engine
from shared.engine_thread import EngineThread
from shared.rpc import handler, invalid
from shared.sampling import Sampled
from shared.sampling_params import finish_reason
from shared.sequence import Sequence
from shared.token_reply import FINISH_REASONS, position_logprobs, sampled_logprobs
from shared.token_request import TokenRequest, read_token_request
from shared.transport.exporter import Exporter
from shared.worker import Site


class PrefillRole(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker's services over its scheduler."""

    service_names = ("tandem.v1.PrefillService", "tandem.v1.KvService")

    def __init__(self, site: Site, engine: Engine) -> None:
        config, plan = site.config.prefill, engine.plan
        pool = BlockPool(
            plan.num_blocks,
            plan.layout.block_tokens,
            prefix_cache=config.prefix_cache,
            model_digest=plan.layout.model_digest,
        )
        self.scheduler = PrefillScheduler(
            engine,
            pool,
            chunk_tokens=config.chunk_tokens,
            batch_tokens=config.batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            cores=site.cores,
        )
        self._site = site
        self._exporter = Exporter(
            site.pools,
            worker_id=site.worker_id,
            kv_endpoint=site.address,
            config=site.config.transport,
        )
        self._export_ids = (f"{site.worker_id}/{number}" for number in itertools.count())

    async def start(self, server: grpc.aio.Server, thread: EngineThread) -> None:
        self._thread = thread
        await self._exporter.start()
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)
        kv_pb2_grpc.add_KvServiceServicer_to_server(self._exporter, server)

    def describe(self, info: worker_pb2.GetInfoResponse) -> None:
        info.role = worker_pb2.WORKER_ROLE_PREFILL
        info.epoch = self._exporter.epoch
        info.kv_endpoint = self._site.address

    async def close(self) -> None:
        await self._exporter.release()
        self._exporter.close()

    @handler
    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        work = read_token_request(request, self._site.limits)
        self._check_sizes(work, request.skip_tokens)
        events: asyncio.Queue[Event] = asyncio.Queue()
        # decode's blocks may be smaller than ours
        skip_tokens = request.skip_tokens // self._site.limits.block_tokens * self._site.limits.block_tokens
        prompt = Prompt(Sequence.start(work), skip_tokens, events.put_nowait, time.monotonic())
        export_id = next(self._export_ids)
        # what the stream holds, given back last to first when the call is done: an end that comes while a message is
        # being sent would reach a `finally` here only once this generator is collected
        lease = ExitStack()
        context.add_done_callback(lambda ctx: lease.close())  # pyright: ignore[reportArgumentType]
        lease.enter_context(self._site.board.admit())
        lease.callback(self._thread.post, partial(self.scheduler.release, prompt))
        lease.callback(self._exporter.close_export, export_id)
        self._exporter.open_export(export_id)
        self._thread.post(partial(self.scheduler.submit, prompt))
        while True:
            match await events.get():
                case Computed(blocks, first_token, num_tokens, mark):
                    self._exporter.extend(export_id, blocks)
                    extent = await self._exporter.extent(export_id, blocks, first_token, num_tokens, mark)
                    yield prefill_pb2.PrefillResponse(extent=extent)
                case Done() as done:
                    # the stream stays open: its end is what frees the blocks
                    yield prefill_pb2.PrefillResponse(first_tokens=self._first_tokens(work, done))
                case Failed(error):
                    raise error

    @handler
    async def EmbedTokens(
        self, request: prefill_pb2.EmbedTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.EmbedTokensResponse:
        raise refuses_to_embed(self._site.limits.model)

    def _check_sizes(self, work: TokenRequest, skip_tokens: int) -> None:
        limits = self._site.limits
        num_blocks = -(-len(work.token_ids) // limits.block_tokens)
        if num_blocks > limits.num_blocks:
            raise invalid(
                "token_ids",
                f"{len(work.token_ids)} tokens take {num_blocks} blocks and this worker's pool has {limits.num_blocks}",
            )
        if skip_tokens >= len(work.token_ids):
            raise invalid("skip_tokens", f"must lie below {len(work.token_ids)} (token_ids), got {skip_tokens}")

    def _first_tokens(self, work: TokenRequest, done: Done) -> prefill_pb2.FirstTokens:
        return prefill_pb2.FirstTokens(
            tokens=[self._first_token(work, index, sampled) for index, sampled in done.tokens],
            cached_tokens=done.cached_tokens,
            prompt_logprobs=[position_logprobs(report) for report in done.prompt_logprobs],
            queue_s=done.queue_s,
            compute_s=done.compute_s,
            worker_id=self._site.worker_id,
        )

    def _first_token(self, work: TokenRequest, index: int, sampled: Sampled) -> prefill_pb2.FirstToken:
        reason = finish_reason(work.params, sampled.token_id, work.position + 1, self._site.engine.plan.eos_token_ids)
        return prefill_pb2.FirstToken(
            index=index,
            token_id=sampled.token_id,
            logprobs=sampled_logprobs(sampled),
            finish_reason=FINISH_REASONS[reason],
        )


def create_role(site: Site) -> PrefillRole | EmbedRole:
    """As the model is made for."""
    if isinstance(site.engine, EncoderEngine):
        return EmbedRole(site, site.engine)
    return PrefillRole(site, site.engine)
