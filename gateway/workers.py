"""All workers: who is alive, how loaded, which pairs can hand over, and who takes the next request.

There is a worker for each address that the entries of the configuration stand for, and a task that holds its load
stream. When the stream breaks the worker counts as gone; when the address answers again it is described anew, for
another process may stand there. An address that no entry stands for any more gets no new work while others can take
it, and is forgotten once nothing runs there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack

import grpc
from tandem.v1 import kv_pb2, worker_pb2

from gateway.agreement import disagreement
from gateway.changes import Changes
from gateway.discovery import Entry, Resolve, resolve
from gateway.metrics import Metrics
from gateway.model import ServedModel
from gateway.pairs import Pairs
from gateway.resolution import Limits
from gateway.router import Candidate, Router
from gateway.worker import DECODE, PREFILL, ROLE_NAMES, Worker, call_failed
from shared.auth import SCHEME
from shared.config import TandemConfig

log = logging.getLogger(__name__)

_ANSWER_S = 10.0  # a connected worker that does not describe itself within this is asked again
_AGAIN_S = 0.1  # pause between two looks at an address that answers but cannot be used
_REMIND_S = 5.0
# After this the gateway starts with the workers that are there, if they can answer a request.
_COMPLETE_S = 30.0
# A decode worker that holds the prefix may have so many requests more than the idlest one.
_DECODE_SLACK = 2.0


class StartError(Exception):
    """The gateway cannot serve with these workers; one reason a line."""


class Workers:
    """Those of the configuration. Use it as an async context manager: its tasks live as long.

    resolve: gives the addresses of a name; default: the system's resolver.
    """

    def __init__(self, config: TandemConfig, model: ServedModel, metrics: Metrics, resolve: Resolve = resolve) -> None:
        self._config, self._model, self._metrics = config, model, metrics
        key = config.auth.cluster_key
        self._metadata = (("authorization", SCHEME + key.get_secret_value()),) if key else ()
        self._entries = [
            Entry(name, role, resolve)
            for role, names in ((PREFILL, config.gateway.prefill_workers), (DECODE, config.gateway.decode_workers))
            for name in names
            if role == PREFILL or not model.embeds
        ]
        self._all: list[Worker] = []
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self.changes = Changes()
        self._pairs = Pairs(config.transport.require, metrics)
        self._routers = {PREFILL: Router(), DECODE: Router()}
        self._reference: worker_pb2.GetInfoResponse | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Workers:
        self._group = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._relist()
        for entry in self._entries:
            if not entry.literal:
                following = self._group.create_task(entry.follow(self._relist), name=f"resolve {entry}")
                self._stack.callback(following.cancel)
        self._stack.callback(self._cancel)
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
        max_context = min(info.max_context for info in infos)
        if not self._model.embeds:
            max_context = min(max_context, *(info.num_blocks * info.layout.block_tokens for info in infos))
        return Limits(max_context=max_context, vocab_size=self.reference.vocab_size)

    @property
    def serving(self) -> bool:
        """Whether somebody can answer a request."""
        return bool(self.usable(PREFILL if self._model.embeds else DECODE))

    def usable(self, role: worker_pb2.WorkerRole.ValueType) -> list[Worker]:
        """Workers of a role that take new work. One that is listed no more does so where nobody else can."""
        usable = [worker for worker in self._all if worker.role == role and worker.usable]
        return [worker for worker in usable if worker.listed] or usable

    def choose_decode(self, prefix: Sequence[bytes], avoid: Collection[str]) -> Worker | None:
        """The decode worker for a request."""
        return self._choose(self.usable(DECODE), self._routers[DECODE], prefix, avoid, slack=_DECODE_SLACK)

    def choose_prefill(self, prefix: Sequence[bytes], avoid: Collection[str], decode_id: str) -> Worker | None:
        """The prefill worker for a request, among those that can hand over to the decode worker."""
        workers = [worker for worker in self.usable(PREFILL) if not self._pairs.refused(decode_id, worker.worker_id)]
        return self._choose(
            workers, self._routers[PREFILL], prefix, avoid, slack_per_block=float(self.layout.block_tokens)
        )

    def choose_embedder(self, avoid: Collection[str]) -> Worker | None:
        """The prefill worker for a request for vectors: the one with the least ahead."""
        return self._choose(self.usable(PREFILL), self._routers[PREFILL], (), avoid)

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
        """Waits until a worker is there for every entry of the configuration.

        Raises StartError if one does not fit, or a pair cannot hand over as required.
        """
        started = reminded = time.monotonic()
        while True:
            faults = [f"{worker}: {worker.fault.message}" for worker in self._all if worker.fault]
            faults += self._pairs.refusals
            if faults:
                raise StartError("\n".join(sorted(set(faults))))
            missing = [str(entry) for entry in self._entries if not self._answers(entry)]
            now = time.monotonic()
            if not missing:
                return
            if now - started > _COMPLETE_S and self.serving:
                log.warning("starting without %s", ", ".join(missing))
                return
            if now - reminded > _REMIND_S:
                reminded = now
                log.info("waiting for %s", ", ".join(missing))
            await self.changes.next(timeout_s=1.0)

    def _answers(self, entry: Entry) -> bool:
        """Whether a worker is alive at some address of an entry."""
        return any(
            worker.role == entry.role and worker.target in entry.targets and (worker.twin or worker).alive
            for worker in self._all
        )

    def _relist(self) -> None:
        """After a look-up: workers at addresses that came, and none at those that went and are not missed."""
        listed: dict[tuple[worker_pb2.WorkerRole.ValueType, str], Entry] = {}
        for entry in self._entries:
            for target in entry.targets:
                listed.setdefault((entry.role, target), entry)
        for worker in self._all:
            worker.listed = listed.pop((worker.role, worker.target), None) is not None
        for (role, target), entry in listed.items():
            name = "" if entry.literal else entry.name
            worker = Worker(target, role, self._config.gateway.max_message_bytes, self._metadata, name)
            self._all.append(worker)
            self._tasks[worker] = self._group.create_task(self._hold(worker), name=f"watch {worker}")
        for worker in [worker for worker in self._all if not worker.listed and self._can_go(worker)]:
            log.info("%s is no longer listed", worker)
            self._all.remove(worker)
            self._went_away(worker)
            self._tasks.pop(worker).cancel()
            self.changes.announce()

    def _can_go(self, worker: Worker) -> bool:
        """Nothing runs there, and it is gone itself or others do its work."""
        return not worker.busy and (not worker.alive or any(other.listed for other in self.usable(worker.role)))

    def _cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _hold(self, worker: Worker) -> None:
        request = worker_pb2.GetInfoRequest()
        try:
            while True:
                try:
                    info = await worker.service.GetInfo(
                        request, timeout=_ANSWER_S, wait_for_ready=True, metadata=worker.metadata
                    )
                    if self._find_twin(worker, info.worker_id):
                        await self.changes.next()
                        continue
                    await self._describe(worker, info)
                    if worker.fault is None:
                        await self._watch(worker)
                except grpc.aio.AioRpcError as error:
                    log.debug("%s: %s", worker, call_failed(error))
                except Exception:
                    # a bug must not leave the worker unwatched for the rest of the gateway's life
                    log.exception("watching %s failed", worker)
                if worker.alive:
                    log.warning("%s is gone", worker)
                self._went_away(worker)
                await asyncio.sleep(_AGAIN_S)
        finally:
            await worker.close()

    def _find_twin(self, worker: Worker, worker_id: str) -> Worker | None:
        """The process of this id at another of its addresses: it may have one of IPv4 and one of IPv6."""
        same = (other for other in self._all if other.worker_id == worker_id and other.role == worker.role)
        twin = next((other for other in same if other is not worker), None)
        if twin is not worker.twin:
            if twin is not None:
                log.info("%s is the same process as %s, and counts once", worker, twin)
            worker.twin = twin
            self.changes.announce()
        return twin

    async def _describe(self, worker: Worker, info: worker_pb2.GetInfoResponse) -> None:
        # compared with those that are there: all of them may come back with another layout
        known = [other.info for other in self._all if other.info]
        converts = self._config.transport.convert_dtype
        fault = disagreement(info, worker.role, self._model.name, self._model.digest, known, converts_dtype=converts)
        if fault is not None:
            if worker.fault is None or worker.fault.message != fault.message:
                log.error("%s is not used: %s", worker, fault.message)
            worker.fault = fault
            self.changes.announce()
            return
        if not known:
            self._reference = info
        worker.info, worker.fault = info, None
        others = [other for other in self._all if other.info and other.role != worker.role]
        pairs = [(worker, other) if worker.role == DECODE else (other, worker) for other in others]
        await asyncio.gather(*(self._pairs.connect(decode, prefill) for decode, prefill in pairs))

    async def _watch(self, worker: Worker) -> None:
        async for load in worker.service.WatchLoad(worker_pb2.WatchLoadRequest(), metadata=worker.metadata):
            changed = not worker.alive or worker.load.draining != load.draining
            worker.load, worker.alive = load, True
            self._metrics.set_worker_load(worker.worker_id, ROLE_NAMES[worker.role], load)
            if changed:
                log.info("%s is %s", worker, "draining" if load.draining else "alive")
                self.changes.announce()

    def _went_away(self, worker: Worker) -> None:
        worker.twin = None
        if worker.info is None:
            return
        if worker.alive:
            self._metrics.remove_worker(worker.worker_id, ROLE_NAMES[worker.role])
        self._routers[worker.role].forget(worker.worker_id)
        self._pairs.forget(worker.worker_id)
        worker.went_away()
        for entry in self._entries:
            if entry.role == worker.role:
                entry.look_again()
        self.changes.announce()
