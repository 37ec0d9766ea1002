"""Whether a worker fits the gateway and the other workers: its model, its KV layout, the role it is listed for."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.v1 import worker_pb2

from shared.rpc import RpcError, mismatch
from shared.transport.wire import FIXED_FIELDS, LAYOUT_FIELDS


def disagreement(
    info: worker_pb2.GetInfoResponse,
    role: worker_pb2.WorkerRole.ValueType,
    model: str,
    model_digest: str,
    others: Iterable[worker_pb2.GetInfoResponse],
    *,
    converts_dtype: bool,
) -> RpcError | None:
    """FAILED_PRECONDITION naming the first field in which a worker differs from what is expected, None if it fits.

    others: workers that fit. Those of one role have one layout; between roles some fields may differ, dtype among them
    if that was asked for, and whether the two can hand over all the same is theirs to say.
    """
    fixed = FIXED_FIELDS if converts_dtype else (*FIXED_FIELDS, "dtype")
    expected_role = worker_pb2.WorkerRole.Name(role)
    if info.role != role:
        return mismatch(
            "role", f"expected {expected_role}, got {worker_pb2.WorkerRole.Name(info.role)}; check the list of workers"
        )
    if info.model != model:
        return mismatch("model", f"the gateway serves {model!r}, the worker {info.model!r}")
    if info.layout.model_digest != model_digest:
        return mismatch(
            "layout.model_digest",
            f"the gateway's model files and quantization give {model_digest[:12]}…, "
            f"the worker's {info.layout.model_digest[:12]}…",
        )
    for other in others:
        for field in LAYOUT_FIELDS if other.role == role else fixed:
            theirs, ours = getattr(info.layout, field), getattr(other.layout, field)
            if theirs != ours:
                return mismatch(f"layout.{field}", f"the other workers have {ours!r}, this one {theirs!r}")
    return None
