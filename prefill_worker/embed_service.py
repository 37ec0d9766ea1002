"""PrefillService of a model that embeds: vectors of token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from tandem.v1 import prefill_pb2, prefill_pb2_grpc, worker_pb2

from prefill_worker.embed_job import Embedded, EmbedFailed, EmbedJob
from prefill_worker.embed_scheduler import EmbedScheduler
from shared.engine import EncoderEngine
from shared.engine_thread import EngineThread
from shared.rpc import RpcError, handler, invalid, mismatch, not_found
from shared.worker import Site

MAX_SEQUENCES = 2048


class EmbedRole(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker's service over its scheduler, for a model that embeds."""

    service_names = ("tandem.v1.PrefillService",)

    def __init__(self, site: Site, engine: EncoderEngine) -> None:
        config = site.config.prefill
        self.scheduler = EmbedScheduler(
            engine,
            batch_tokens=config.batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            cores=site.cores,
        )
        self._site = site
        self._size = engine.plan.architecture.hidden_size
        self._normalizes = bool(engine.plan.pooling and engine.plan.pooling.normalizes)

    async def start(self, server: grpc.aio.Server, thread: EngineThread) -> None:
        self._thread = thread
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    def describe(self, info: worker_pb2.GetInfoResponse) -> None:
        info.role = worker_pb2.WORKER_ROLE_PREFILL
        info.embedding_size = self._size
        info.normalizes = self._normalizes

    async def close(self) -> None:
        """Nothing outlives its call."""

    @handler
    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        raise mismatch("model", f"{self._site.limits.model!r} embeds texts and generates nothing; call EmbedTokens")
        yield  # what makes it a stream

    @handler
    async def EmbedTokens(
        self, request: prefill_pb2.EmbedTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.EmbedTokensResponse:
        self._check(request)
        done: asyncio.Future[Embedded | EmbedFailed] = asyncio.get_running_loop().create_future()

        def receive(event: Embedded | EmbedFailed) -> None:
            if not done.done():
                done.set_result(event)

        job = EmbedJob(
            [tuple(sequence.token_ids) for sequence in request.sequences],
            request.normalize,
            request.dimensions or self._size,
            request.priority,
            receive,
            time.monotonic(),
        )
        with self._site.board.admit():
            self._thread.post(partial(self.scheduler.submit, job))
            try:
                event = await done
            finally:
                self._thread.post(partial(self.scheduler.release, job))
        if isinstance(event, EmbedFailed):
            raise event.error
        return prefill_pb2.EmbedTokensResponse(
            vectors=[prefill_pb2.Vector(values=vector.tolist()) for vector in event.vectors],
            queue_s=event.queue_s,
            compute_s=event.compute_s,
            worker_id=self._site.worker_id,
        )

    def _check(self, request: prefill_pb2.EmbedTokensRequest) -> None:
        """Raises INVALID_ARGUMENT naming every field at fault; NOT_FOUND for the model."""
        limits = self._site.limits
        if request.model and request.model != limits.model:
            raise not_found(
                "model", request.model, f"the model {request.model!r} is not served here; {limits.model!r} is"
            )
        faults: list[tuple[str, str]] = []
        if not 1 <= len(request.sequences) <= MAX_SEQUENCES:
            faults.append(("sequences", f"1 to {MAX_SEQUENCES}, got {len(request.sequences)}"))
        for i, sequence in enumerate(request.sequences):
            field, ids = f"sequences[{i}].token_ids", sequence.token_ids
            if not 1 <= len(ids) <= limits.max_context:
                faults.append((field, f"1 to {limits.max_context} tokens, got {len(ids)}"))
            elif (largest := max(ids)) >= limits.vocab_size:
                faults.append((field, f"token {largest} is outside the vocabulary of {limits.vocab_size}"))
        if request.dimensions > self._size:
            faults.append(("dimensions", f"at most {self._size}, got {request.dimensions}"))
        if faults:
            raise invalid(*faults[0], *faults[1:])


def refuses_to_embed(model: str) -> RpcError:
    """Of a worker whose model generates."""
    return mismatch("model", f"{model!r} generates tokens and embeds nothing; call Prefill")
