"""Which decode workers can take KV blocks from which prefill workers: any two shake hands before a request does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from tandem.v1 import decode_pb2, types_pb2

from gateway.metrics import Metrics, transport_name
from gateway.worker import Worker, call_failed
from shared.rpc import RpcError, from_grpc, mismatch

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_REQUIRED = {
    "cuda_ipc": types_pb2.TRANSPORT_CUDA_IPC,
    "shared_memory": types_pb2.TRANSPORT_SHARED_MEMORY,
    "inline": types_pb2.TRANSPORT_INLINE,
}


@dataclass(frozen=True)
class _Pair:
    """What a decode worker and a prefill worker agreed on: a transport, or the reason why they cannot hand over."""

    transport: types_pb2.Transport.ValueType
    refusal: RpcError | None = None


class Pairs:
    """Of the workers that are there. required: a pair on a lesser transport than this one hands nothing over."""

    def __init__(self, required: str | None, metrics: Metrics) -> None:
        self._required = required
        self._metrics = metrics
        self._pairs: dict[tuple[str, str], _Pair] = {}  # (decode worker_id, prefill worker_id)

    @property
    def refusals(self) -> list[str]:
        """Why there are pairs that cannot hand over."""
        return [pair.refusal.message for pair in self._pairs.values() if pair.refusal]

    def refused(self, decode_id: str, prefill_id: str) -> bool:
        """Whether two workers are known to be unable to hand over."""
        pair = self._pairs.get((decode_id, prefill_id))
        return pair is not None and pair.refusal is not None

    def forget(self, worker_id: str) -> None:
        """A worker is gone."""
        for key in [key for key in self._pairs if worker_id in key]:
            del self._pairs[key]
            self._metrics.remove_pair(*key)

    async def connect(self, decode: Worker, prefill: Worker) -> None:
        """Lets two workers shake hands, and keeps what came of it."""
        assert decode.info
        assert prefill.info
        key = (decode.worker_id, prefill.worker_id)
        request = decode_pb2.ConnectRequest(kv_endpoint=prefill.info.kv_endpoint)
        try:
            with decode.held():
                answer = await decode.decode.Connect(request, timeout=_ANSWER_S, metadata=decode.metadata)
        except grpc.aio.AioRpcError as error:
            log.warning("%s cannot take KV blocks from %s: %s", decode, prefill, call_failed(error))
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                self._keep(key, decode, prefill, _Pair(types_pb2.TRANSPORT_UNSPECIFIED, from_grpc(error)), [])
            return
        refusals = "; ".join(f"{transport_name(r.transport)}: {r.reason}" for r in answer.refusals)
        pair = _Pair(answer.transport, self._too_slow(decode, prefill, answer.transport, refusals))
        self._keep(key, decode, prefill, pair, answer.refusals)
        log.info(
            "%s takes KV blocks from %s over %s%s",
            decode,
            prefill,
            transport_name(answer.transport),
            f" ({refusals})" if refusals else "",
        )

    def _keep(
        self,
        key: tuple[str, str],
        decode: Worker,
        prefill: Worker,
        pair: _Pair,
        refusals: Sequence[types_pb2.TransportRefusal],
    ) -> None:
        if key == (decode.worker_id, prefill.worker_id):  # neither has gone in the meantime
            self._pairs[key] = pair
            self._metrics.set_pair(*key, pair.transport, refusals)

    def _too_slow(
        self, decode: Worker, prefill: Worker, transport: types_pb2.Transport.ValueType, refusals: str
    ) -> RpcError | None:
        if self._required is None or transport >= _REQUIRED[self._required]:
            return None
        return mismatch(
            "transport.require",
            f"{self._required} is required, and {decode} and {prefill} agreed on {transport_name(transport)} "
            f"({refusals})",
        )
