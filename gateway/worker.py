"""One worker as the gateway sees it: a channel, its description, its load, and what this gateway has running there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from tandem.v1 import decode_pb2_grpc, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc

from shared.rpc import RpcError, connect

PREFILL = worker_pb2.WORKER_ROLE_PREFILL
DECODE = worker_pb2.WORKER_ROLE_DECODE
ROLE_NAMES = {PREFILL: "prefill", DECODE: "decode"}

Metadata = tuple[tuple[str, str], ...]

# So many prompt tokens weigh as much as a request: what a decode worker takes into a step unless it is told otherwise.
_TOKENS_AS_A_REQUEST = 256


class Worker:
    """A worker at an address; the process there may come and go, each time under a new worker_id.

    target: its address:port. name: the entry of the configuration that it stands behind, if that is another one.
    metadata: sent with every call, the cluster's key.
    """

    def __init__(
        self,
        target: str,
        role: worker_pb2.WorkerRole.ValueType,
        max_message_bytes: int,
        metadata: Metadata = (),
        name: str = "",
    ) -> None:
        self.target, self.role, self.metadata, self.name = target, role, metadata, name or target
        self.channel = connect(target, max_message_bytes)
        self.service: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(self.channel)  # type: ignore[assignment]
        self.prefill: prefill_pb2_grpc.PrefillServiceAsyncStub = prefill_pb2_grpc.PrefillServiceStub(self.channel)  # type: ignore[assignment]
        self.decode: decode_pb2_grpc.DecodeServiceAsyncStub = decode_pb2_grpc.DecodeServiceStub(self.channel)  # type: ignore[assignment]
        self.info: worker_pb2.GetInfoResponse | None = None
        self.alive = False
        self.fault: RpcError | None = None  # why it may not be used although it answers
        self.listed = True  # whether some entry of the configuration still stands for its address
        self.twin: Worker | None = None  # the same process at another address, which is the one that is used
        self._load = worker_pb2.WatchLoadResponse()
        self._in_flight = 0.0
        self._in_flight_at_report = 0.0
        self._holders = 0

    def __str__(self) -> str:
        name = f"{ROLE_NAMES[self.role]} worker {self.name}"
        if self.name != self.target:
            name += f" at {self.target.rpartition(':')[0].strip('[]')}"
        return f"{name} ({self.info.worker_id})" if self.info else name

    @property
    def worker_id(self) -> str:
        return self.info.worker_id if self.info else ""

    @property
    def usable(self) -> bool:
        """Whether new work may go there."""
        return self.alive and not self._load.draining

    @property
    def load(self) -> worker_pb2.WatchLoadResponse:
        return self._load

    @load.setter
    def load(self, report: worker_pb2.WatchLoadResponse) -> None:
        self._load = report
        self._in_flight_at_report = self._in_flight

    @property
    def work_ahead(self) -> float:
        """Prompt tokens (prefill) or requests (decode) ahead of a new one: the last report, and what was sent since.

        Prompts that a decode worker computes count beside the requests that they belong to.
        """
        load = self._load
        reported = load.queued_tokens
        if self.role == DECODE:
            reported = load.running + load.waiting + load.queued_tokens / _TOKENS_AS_A_REQUEST
        return max(0.0, reported + self._in_flight - self._in_flight_at_report)

    @contextmanager
    def working(self, amount: float) -> Iterator[None]:
        """Counts work sent there, in the unit of work_ahead, until it is done."""
        self._in_flight += amount
        try:
            yield
        finally:
            self._in_flight -= amount

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a call: as long as one runs, the channel is not closed."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    @property
    def busy(self) -> bool:
        """Whether a call of a request runs there."""
        return self._holders > 0

    def went_away(self) -> None:
        """The process there is gone, or cannot be reached."""
        self.info, self.alive = None, False
        self._load = worker_pb2.WatchLoadResponse()
        self._in_flight_at_report = self._in_flight

    async def close(self) -> None:
        await self.channel.close()


def call_failed(error: grpc.aio.AioRpcError) -> str:
    """A failed call in one line."""
    return f"{error.code().name}: {error.details()}"
