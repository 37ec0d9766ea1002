"""`tandem health`: whether a process serves, by the standard gRPC health service; for health checks of containers."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# A proxy that the environment names is for what lies outside.
_OPTIONS = (("grpc.enable_http_proxy", 0),)


def run(address: str, *, service: str, timeout_s: float) -> int:
    """Prints what the process at host:port says of a service, "" = all of it; the exit status is 0 if it is SERVING."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            # its methods are made when it is, which type checkers do not see
            reply = stub.Check(request, timeout=timeout_s)  # pyright: ignore[reportAttributeAccessIssue]
        except grpc.RpcError as error:
            print(f"no answer at {address}: {_reason(error)}")
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
    return int(reply.status != health_pb2.HealthCheckResponse.SERVING)


def _reason(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    return f"{error.code().name}: {error.details()}"
