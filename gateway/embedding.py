"""The life of a request for vectors: a place in the gateway, and one prefill worker after another until one answers."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
from tandem.v1 import inference_pb2, prefill_pb2, types_pb2

from gateway.admission import Admission
from gateway.embedding_job import EmbeddingJob
from gateway.failure import PrefillFailed
from gateway.leg import out_of_attempts
from gateway.metrics import Metrics
from gateway.worker import Worker
from gateway.workers import Workers
from shared.config import GatewayConfig
from shared.rpc import RpcError, from_grpc, internal, unavailable

log = logging.getLogger(__name__)

_AGAIN_S = 0.25


class Embedding:
    """Runs once. receipt: with what is known before. arrived_at: on time.monotonic()'s clock."""

    def __init__(
        self,
        job: EmbeddingJob,
        receipt: types_pb2.Receipt,
        arrived_at: float,
        workers: Workers,
        config: GatewayConfig,
        metrics: Metrics,
    ) -> None:
        self._job, self._receipt, self._arrived_at = job, receipt, arrived_at
        self._workers, self._config, self._metrics = workers, config, metrics
        self._stage = "before it was admitted"
        self._usage = types_pb2.Usage(prompt_tokens=job.num_tokens)
        self._timings = types_pb2.Timings()

    async def run(self, admission: Admission) -> inference_pb2.EmbedResponse:
        """Raises RpcError."""
        admitted, code = False, "OK"
        try:
            async with self._job.budget.enforce():
                self._stage = "in the gateway's queue"
                async with admission.place(self._job.priority, self._job.budget):
                    admitted = True
                    self._metrics.request_started()
                    self._stage = "while its vectors were computed"
                    return self._response(await self._computed())
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            failure = self._failure(error)
            code = failure.code.name
            raise failure from None
        finally:
            self._report(code, admitted=admitted)

    async def _computed(self) -> prefill_pb2.EmbedTokensResponse:
        """By one worker or another."""
        failed: dict[str, PrefillFailed] = {}
        lost_at: float | None = None
        while True:
            worker = self._workers.choose_embedder(failed)
            if worker is None:
                await self._wait_for_worker(lost_at, failed)
                failed.clear()
                continue
            self._receipt.attempts += 1
            try:
                return await self._ask(worker)
            except PrefillFailed as failure:
                if not failure.recoverable:
                    raise failure.error from None
                log.warning("request %s: vectors failed: %s", self._job.request_id, failure)
                failed[failure.worker_id] = failure
                lost_at = lost_at or time.monotonic()
                if self._receipt.attempts >= self._config.max_attempts:
                    raise out_of_attempts(self._receipt.attempts, failure) from None

    async def _ask(self, worker: Worker) -> prefill_pb2.EmbedTokensResponse:
        worker_id = worker.worker_id
        with worker.held(), worker.working(self._job.num_tokens):
            try:
                reply = await worker.prefill.EmbedTokens(
                    self._job.to_proto(self._receipt.attempts),
                    timeout=self._job.budget.left_s,
                    metadata=worker.metadata,
                )
            except grpc.aio.AioRpcError as error:
                raise PrefillFailed(worker_id, from_grpc(error)) from None
        sizes = {len(vector.values) for vector in reply.vectors}
        if len(reply.vectors) != len(self._job.inputs) or sizes != {self._job.dimensions}:
            log.error("request %s: %s sent other vectors than it was asked for", self._job.request_id, worker)
            raise PrefillFailed(worker_id, unavailable("it sent other vectors than it was asked for"))
        self._receipt.prefill_workers.append(worker_id)
        return reply

    async def _wait_for_worker(self, lost_at: float | None, failed: dict[str, PrefillFailed]) -> None:
        """While nobody is there who has not failed. Raises UNAVAILABLE, or what a full worker said."""
        full = [failure for failure in failed.values() if failure.full]
        if full:
            raise full[-1].error
        if lost_at is None:
            raise unavailable("no prefill worker is alive")
        left_s = lost_at + self._config.recovery_wait_s - time.monotonic()
        if left_s <= 0:
            raise unavailable(f"no prefill worker took the request over within {self._config.recovery_wait_s:g} s")
        await self._workers.changes.next(timeout_s=min(left_s, _AGAIN_S))

    def _response(self, reply: prefill_pb2.EmbedTokensResponse) -> inference_pb2.EmbedResponse:
        total_s = time.monotonic() - self._arrived_at
        self._timings = types_pb2.Timings(
            queue_s=max(0.0, total_s - reply.compute_s), prefill_s=reply.compute_s, total_s=total_s
        )
        embeddings = [
            inference_pb2.Embedding(values=vector.values, num_tokens=len(each.token_ids), truncated=each.truncated)
            for vector, each in zip(reply.vectors, self._job.inputs, strict=True)
        ]
        return inference_pb2.EmbedResponse(
            request_id=self._job.request_id,
            embeddings=embeddings,
            normalized=self._job.normalize,
            usage=self._usage,
            timings=self._timings,
            receipt=self._receipt,
        )

    def _failure(self, error: Exception) -> RpcError:
        # a worker's own clock may be the first to see the end of the budget
        late = isinstance(error, RpcError) and error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        if late or isinstance(error, TimeoutError):
            return self._job.budget.spent(self._stage)
        return error if isinstance(error, RpcError) else internal(error)

    def _report(self, code: str, *, admitted: bool) -> None:
        if not admitted:
            self._metrics.request_refused(code, model=self._job.model, method="Embed")
            return
        self._metrics.request_finished(
            code,
            model=self._job.model,
            method="Embed",
            usage=self._usage if code == "OK" else None,
            timings=self._timings,
        )
