"""The life of one request: a place in the gateway, legs until every output is done, and how it ended.

A leg whose decode worker fails is followed by new ones for its unfinished outputs, with the tokens generated so far as
part of their history: the client sees a pause.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import grpc

from gateway.admission import Admission
from gateway.failure import DecodeFailed, together
from gateway.job import Job
from gateway.journal import Journal
from gateway.leg import Leg, out_of_attempts
from gateway.metrics import Metrics
from gateway.output import Output
from gateway.record import Record
from gateway.worker import Worker
from gateway.workers import Workers
from shared.config import GatewayConfig
from shared.rpc import RpcError, internal, unavailable

log = logging.getLogger(__name__)

# How often a worker that failed, and still counts as alive, is tried again while there is no other.
_AGAIN_S = 0.25
# By so much may the clocks of a client's deadline and of its budget here differ.
_SAME_MOMENT_S = 0.02


class Request:
    """Runs once; everything it produces goes into the record."""

    def __init__(
        self, job: Job, journal: Journal, record: Record, workers: Workers, config: GatewayConfig, metrics: Metrics
    ) -> None:
        self._job, self._journal, self._record = job, journal, record
        self._workers, self._config, self._metrics = workers, config, metrics

    async def run(self, admission: Admission) -> None:
        """Never raises but CancelledError: an error is the record's."""
        admitted = False
        try:
            async with self._job.budget.enforce():
                self._journal.stage = "in the gateway's queue"
                async with admission.place(self._job.priority, self._job.budget):
                    admitted = True
                    self._metrics.request_started()
                    self._journal.stage = "while it waited for a decode worker"
                    await self._serve(self._record.outputs, attempt=0)
        except TimeoutError:
            self._record.fail(self._job.budget.spent(self._journal.stage))
        except asyncio.CancelledError:
            self._record.fail(self._left())
            raise
        except RpcError as error:
            # a worker's own clock may be the first to see the end of the budget
            late = error.code == grpc.StatusCode.DEADLINE_EXCEEDED
            self._record.fail(self._job.budget.spent(self._journal.stage) if late else error)
        except Exception as error:
            self._record.fail(internal(error))
        finally:
            self._report(admitted)

    async def _serve(self, outputs: Sequence[Output], attempt: int) -> None:
        """Legs on one decode worker after another, until the outputs, which share their history, are done."""
        avoid: set[str] = set()
        refusal: RpcError | None = None
        lost_at: float | None = None if not attempt else time.monotonic()
        while True:
            decode = self._workers.choose_decode(self._job.prefix, avoid)
            if decode is None:
                if lost_at is None:
                    raise refusal or unavailable("no decode worker is alive")
                await self._wait_for_worker(lost_at, refusal)
                avoid.clear()
                continue
            leg = self._leg(outputs, decode, attempt)
            try:
                await leg.run()
                return
            except DecodeFailed as failure:
                if not failure.recoverable:
                    raise failure.error from None
                log.warning("request %s: decode failed: %s", self._job.request_id, failure)
                avoid.add(failure.worker_id)
                refusal = failure.error
                if leg.attempt >= self._config.max_attempts:
                    raise out_of_attempts(leg.attempt, failure) from None
            if leg.reserved:
                self._journal.stage = "while it recovered from the loss of a decode worker"
                groups = _by_history([output for output in outputs if not output.done])
                if len(groups) > 1:
                    await together(*(self._serve(group, leg.attempt) for group in groups))
                    return
                if not groups:
                    return
                outputs, attempt, lost_at = groups[0], leg.attempt, time.monotonic()

    def _leg(self, outputs: Sequence[Output], decode: Worker, attempt: int) -> Leg:
        return Leg(
            self._job,
            self._journal,
            self._record,
            self._workers,
            outputs,
            decode,
            attempt=attempt,
            max_attempts=self._config.max_attempts,
            local_tokens=self._config.local_prefill_tokens,
            progressed=self._progressed,
        )

    async def _wait_for_worker(self, lost_at: float, refusal: RpcError | None) -> None:
        left_s = lost_at + self._config.recovery_wait_s - time.monotonic()
        if left_s <= 0:
            reason = f": {refusal.message}" if refusal else ""
            raise unavailable(
                f"no decode worker took the request over within {self._config.recovery_wait_s:g} s{reason}"
            )
        await self._workers.changes.next(timeout_s=min(left_s, _AGAIN_S))

    def _progressed(self) -> None:
        if all(output.done for output in self._record.outputs):
            self._record.finish(self._journal.last_message(self._record.outputs))
        else:
            self._record.notify()

    def _left(self) -> RpcError:
        """Why nobody waits any more: the client's own deadline ends its call when the budget ends."""
        if self._job.budget.left_s < _SAME_MOMENT_S:
            return self._job.budget.spent(self._journal.stage)
        return RpcError(grpc.StatusCode.CANCELLED, "the request was cancelled")

    def _report(self, admitted: bool) -> None:
        error, last = self._record.error, self._record.last
        code = error.code.name if error else "OK"
        if not admitted:
            self._metrics.request_refused(code, model=self._job.model)
            return
        message = last or self._journal.last_message(self._record.outputs)
        self._metrics.request_finished(
            code,
            model=self._job.model,
            usage=message.usage,
            timings=message.timings,
            receipt=message.receipt,
            num_outputs=len(self._record.outputs),
        )


def _by_history(outputs: Sequence[Output]) -> list[list[Output]]:
    """Outputs that generated the same tokens so far go on together."""
    groups: dict[tuple[int, ...], list[Output]] = {}
    for output in outputs:
        groups.setdefault(tuple(output.token_ids), []).append(output)
    return list(groups.values())
