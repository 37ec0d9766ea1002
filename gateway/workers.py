"""All workers: who is alive, how loaded, which pairs can hand over, and who takes the next request.

One task per worker holds its load stream for ever. When the stream breaks the worker counts as gone; when the address
answers again it is described anew, for another process may stand there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
from tandem.v1 import decode_pb2, kv_pb2, types_pb2, worker_pb2

from gateway.agreement import disagreement
from gateway.changes import Changes
from gateway.metrics import Metrics, transport_name
from gateway.model import ServedModel
from gateway.resolution import Limits
from gateway.router import Candidate, Router
from gateway.worker import DECODE, PREFILL, ROLE_NAMES, Worker, call_failed
from shared.auth import SCHEME
from shared.config import TandemConfig
from shared.rpc import RpcError, from_grpc, mismatch

log = logging.getLogger(__name__)

_ANSWER_S = 10.0  # a connected worker that does not describe itself within this is asked again
_AGAIN_S = 0.1  # pause between two looks at an address that answers but cannot be used
_REMIND_S = 5.0
# After this the gateway starts with the workers that are there, if one of them decodes.
_COMPLETE_S = 30.0
# A decode worker that holds the prefix may have so many requests more than the idlest one.
_DECODE_SLACK = 2.0
_REQUIRED = {"shared_memory": types_pb2.TRANSPORT_SHARED_MEMORY, "inline": types_pb2.TRANSPORT_INLINE}


class StartError(Exception):
    """The gateway cannot serve with these workers; one reason a line."""


@dataclass(frozen=True)
class _Pair:
    """What a decode worker and a prefill worker agreed on: a transport, or the reason why they cannot hand over."""

    transport: types_pb2.Transport.ValueType
    refusal: RpcError | None = None


class Workers:
    """The static list of the configuration. Use it as an async context manager: its tasks live as long."""

    def __init__(self, config: TandemConfig, model: ServedModel, metrics: Metrics) -> None:
        self._config, self._model, self._metrics = config, model, metrics
        key = config.auth.cluster_key
        metadata = (("authorization", SCHEME + key.get_secret_value()),) if key else ()
        gateway = config.gateway
        self._all = [
            Worker(target, role, gateway.max_message_bytes, metadata)
            for role, targets in ((PREFILL, gateway.prefill_workers), (DECODE, gateway.decode_workers))
            for target in targets
        ]
        self.changes = Changes()
        self._pairs: dict[tuple[str, str], _Pair] = {}  # (decode worker_id, prefill worker_id)
        self._routers = {PREFILL: Router(), DECODE: Router()}
        self._reference: worker_pb2.GetInfoResponse | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Workers:
        for worker in self._all:
            self._stack.push_async_callback(worker.close)
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        for worker in self._all:
            self._stack.callback(group.create_task(self._hold(worker), name=f"watch {worker}").cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    # -- what requests ask ------------------------------------------------------------------------------------------

    @property
    def reference(self) -> worker_pb2.GetInfoResponse:
        """The description of the first of the workers that are there; in what matters to clients all are alike."""
        if self._reference is None:
            raise LookupError("no worker has described itself yet")
        return self._reference

    @property
    def layout(self) -> kv_pb2.KvLayout:
        return self.reference.layout

    @property
    def limits(self) -> Limits:
        """What every worker that is known can take."""
        infos = [worker.info for worker in self._all if worker.info] or [self.reference]
        max_context = min(min(info.max_context, info.num_blocks * self.layout.block_tokens) for info in infos)
        return Limits(max_context=max_context, vocab_size=self.reference.vocab_size)

    def usable(self, role: worker_pb2.WorkerRole.ValueType) -> list[Worker]:
        """Workers of a role that take new work."""
        return [worker for worker in self._all if worker.role == role and worker.usable]

    def choose_decode(self, prefix: Sequence[bytes], avoid: Collection[str]) -> Worker | None:
        """The decode worker for a request."""
        return self._choose(self.usable(DECODE), self._routers[DECODE], prefix, avoid, slack=_DECODE_SLACK)

    def choose_prefill(self, prefix: Sequence[bytes], avoid: Collection[str], decode_id: str) -> Worker | None:
        """The prefill worker for a request, among those that can hand over to the decode worker."""
        workers = [worker for worker in self.usable(PREFILL) if not self._refused(decode_id, worker.worker_id)]
        return self._choose(
            workers, self._routers[PREFILL], prefix, avoid, slack_per_block=float(self.layout.block_tokens)
        )

    def _refused(self, decode_id: str, prefill_id: str) -> bool:
        pair = self._pairs.get((decode_id, prefill_id))
        return pair is not None and pair.refusal is not None

    @staticmethod
    def _choose(
        workers: list[Worker],
        router: Router,
        prefix: Sequence[bytes],
        avoid: Collection[str],
        *,
        slack: float = 0.0,
        slack_per_block: float = 0.0,
    ) -> Worker | None:
        candidates = [Candidate(worker.worker_id, worker.work_ahead) for worker in workers]
        chosen = router.choose(candidates, prefix, excluded=avoid, slack=slack, slack_per_block=slack_per_block)
        return next((worker for worker in workers if worker.worker_id == chosen), None)

    # -- coming and going -------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Waits for the workers. Raises StartError if one does not fit, or a pair cannot hand over as required."""
        started = reminded = time.monotonic()
        while True:
            faults = [f"{worker}: {worker.fault.message}" for worker in self._all if worker.fault]
            faults += [pair.refusal.message for pair in self._pairs.values() if pair.refusal]
            if faults:
                raise StartError("\n".join(sorted(set(faults))))
            missing = [str(worker) for worker in self._all if not worker.alive]
            now = time.monotonic()
            if not missing:
                return
            if now - started > _COMPLETE_S and self.usable(DECODE):
                log.warning("starting without %s", ", ".join(missing))
                return
            if now - reminded > _REMIND_S:
                reminded = now
                log.info("waiting for %s", ", ".join(missing))
            await self.changes.next(timeout_s=1.0)

    async def _hold(self, worker: Worker) -> None:
        request = worker_pb2.GetInfoRequest()
        while True:
            try:
                info = await worker.service.GetInfo(
                    request, timeout=_ANSWER_S, wait_for_ready=True, metadata=worker.metadata
                )
                await self._describe(worker, info)
                if worker.fault is None:
                    await self._watch(worker)
            except grpc.aio.AioRpcError as error:
                log.debug("%s: %s", worker, call_failed(error))
            except Exception:
                # a bug must not leave the worker unwatched for the rest of the gateway's life
                log.exception("watching %s failed", worker)
            self._went_away(worker)
            await asyncio.sleep(_AGAIN_S)

    async def _describe(self, worker: Worker, info: worker_pb2.GetInfoResponse) -> None:
        # compared with those that are there: all of them may come back with another layout
        known = next((other.info.layout for other in self._all if other.info), None)
        fault = disagreement(info, worker.role, self._model.name, self._model.digest, known)
        if fault is not None:
            if worker.fault is None or worker.fault.message != fault.message:
                log.error("%s is not used: %s", worker, fault.message)
            worker.fault = fault
            self.changes.announce()
            return
        if known is None:
            self._reference = info
        worker.info, worker.fault = info, None
        others = [other for other in self._all if other.info and other.role != worker.role]
        pairs = [(worker, other) if worker.role == DECODE else (other, worker) for other in others]
        await asyncio.gather(*(self._connect(decode, prefill) for decode, prefill in pairs))

    async def _connect(self, decode: Worker, prefill: Worker) -> None:
        """Lets two workers shake hands before the first request does."""
        assert decode.info
        assert prefill.info
        key = (decode.worker_id, prefill.worker_id)
        request = decode_pb2.ConnectRequest(kv_endpoint=prefill.info.kv_endpoint)
        try:
            answer = await decode.decode.Connect(request, timeout=_ANSWER_S, metadata=decode.metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                self._pairs[key] = _Pair(types_pb2.TRANSPORT_UNSPECIFIED, from_grpc(error))
            log.warning("%s cannot take KV blocks from %s: %s", decode, prefill, call_failed(error))
            return
        refusals = "; ".join(f"{transport_name(r.transport)}: {r.reason}" for r in answer.refusals)
        self._pairs[key] = _Pair(answer.transport, self._too_slow(decode, prefill, answer.transport, refusals))
        log.info(
            "%s takes KV blocks from %s over %s%s",
            decode,
            prefill,
            transport_name(answer.transport),
            f" ({refusals})" if refusals else "",
        )

    def _too_slow(
        self, decode: Worker, prefill: Worker, transport: types_pb2.Transport.ValueType, refusals: str
    ) -> RpcError | None:
        required = self._config.transport.require
        if required is None or transport >= _REQUIRED[required]:
            return None
        return mismatch(
            "transport.require",
            f"{required} is required, and {decode} and {prefill} agreed on {transport_name(transport)} ({refusals})",
        )

    async def _watch(self, worker: Worker) -> None:
        async for load in worker.service.WatchLoad(worker_pb2.WatchLoadRequest(), metadata=worker.metadata):
            changed = not worker.alive or worker.load.draining != load.draining
            worker.load, worker.alive = load, True
            self._metrics.set_worker_load(worker.worker_id, ROLE_NAMES[worker.role], load)
            if changed:
                log.info("%s is %s", worker, "draining" if load.draining else "alive")
                self.changes.announce()

    def _went_away(self, worker: Worker) -> None:
        if worker.info is None:
            return
        if worker.alive:
            log.warning("%s is gone", worker)
            self._metrics.remove_worker(worker.worker_id, ROLE_NAMES[worker.role])
        self._routers[worker.role].forget(worker.worker_id)
        self._pairs = {key: pair for key, pair in self._pairs.items() if worker.worker_id not in key}
        worker.went_away()
        self.changes.announce()
