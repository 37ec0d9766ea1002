"""Whether a worker fits the gateway and the other workers: its model, its KV layout, the role it is listed for."""

from __future__ import annotations

from tandem.v1 import kv_pb2, worker_pb2

from shared.rpc import RpcError, mismatch


def disagreement(
    info: worker_pb2.GetInfoResponse,
    role: worker_pb2.WorkerRole.ValueType,
    model: str,
    model_digest: str,
    layout: kv_pb2.KvLayout | None,
) -> RpcError | None:
    """FAILED_PRECONDITION naming the first field in which a worker differs from what is expected, None if it fits.

    layout: of another worker of its role, if there is one. Whether prefill's fits decode's is theirs to say.
    """
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
    for field in kv_pb2.KvLayout.DESCRIPTOR.fields if layout is not None else ():
        theirs, ours = getattr(info.layout, field.name), getattr(layout, field.name)
        if theirs != ours:
            return mismatch(f"layout.{field.name}", f"the others of its role have {ours!r}, this one {theirs!r}")
    return None
