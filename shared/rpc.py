"""gRPC as all processes use it: channel options, errors with typed details, standard services.

Errors are raised as `RpcError` anywhere below a handler and leave the process as a gRPC status with google.rpc details:

    raise invalid("sampling.top_p", "must be in (0, 1], got 3; use 1 to keep all candidates")
    raise exhausted("the queue is full (512 requests wait)", retry_after_s=0.5)
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

log = logging.getLogger(__name__)

DOMAIN = "tandem"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 16 << 20
# A peer that hangs, or is cut off, is noticed after both of them at the latest.
KEEPALIVE_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
# A status travels as trailing metadata, once as text and once as details. Clients take 8 KiB of it by default, and
# report RESOURCE_EXHAUSTED in place of a status that is larger: what errors quote from a request is cut.
MAX_TEXT_BYTES = 512
MAX_VIOLATIONS = 8


def channel_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """Options set alike on both ends: a server that counts pings as abuse would kill quiet streams."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # of every other ping: while one is under way none is sent for keepalive, and by default it may take a minute
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
        # a worker that comes back is found at once, not after two minutes of backoff
        ("grpc.initial_reconnect_backoff_ms", 100),
        # despite its name this bounds one connection attempt: a busy peer needs more than an instant to answer
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def connect(
    target: str,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """A channel to host:port. Not shared between channels of one process, so that each sees its own failures."""
    return grpc.aio.insecure_channel(
        target,
        options=[*channel_options(max_message_bytes), ("grpc.use_local_subchannel_pool", 1)],
        interceptors=interceptors,
    )


def create_server(
    max_message_bytes: int = MAX_MESSAGE_BYTES, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> grpc.aio.Server:
    """A server whose handlers may raise RpcError; any other exception becomes INTERNAL with an incident id."""
    return grpc.aio.server(options=channel_options(max_message_bytes), interceptors=interceptors)


@dataclass
class RpcError(Exception):
    """A failure with its gRPC code, message and google.rpc details."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        self.message = _cut(self.message)

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which a retry makes sense, if the error says so."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return detail.retry_delay.ToTimedelta().total_seconds()
        return None

    @property
    def field(self) -> str | None:
        """The request field at fault, if the error names one."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
                return detail.field_violations[0].field
        return None


def invalid(field: str, description: str, *more: tuple[str, str]) -> RpcError:
    """INVALID_ARGUMENT naming each field at fault."""
    faults = ((field, description), *more)[:MAX_VIOLATIONS]
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=_cut(f, 128), description=_cut(d, 256)) for f, d in faults
    ]
    return RpcError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "; ".join(f"{v.field}: {v.description}" for v in violations),
        (error_details_pb2.BadRequest(field_violations=violations), _info("INVALID_ARGUMENT")),
    )


def not_found(kind: str, name: str, message: str) -> RpcError:
    """NOT_FOUND naming the resource."""
    return RpcError(
        grpc.StatusCode.NOT_FOUND,
        message,
        (
            error_details_pb2.ResourceInfo(resource_type=kind, resource_name=_cut(name), description=_cut(message)),
            _info("NOT_FOUND"),
        ),
    )


def exhausted(message: str, retry_after_s: float = 1.0) -> RpcError:
    """RESOURCE_EXHAUSTED: a queue or pool is full; retry-safe."""
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, (_retry(retry_after_s), _info("RESOURCE_EXHAUSTED")))


def unavailable(message: str, retry_after_s: float = 1.0) -> RpcError:
    """UNAVAILABLE: draining, or no worker alive; retry-safe."""
    return RpcError(grpc.StatusCode.UNAVAILABLE, message, (_retry(retry_after_s), _info("UNAVAILABLE")))


def mismatch(field: str, message: str) -> RpcError:
    """FAILED_PRECONDITION naming the field in which two parts disagree."""
    return RpcError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"{field}: {message}",
        (
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="MISMATCH", subject=field, description=_cut(message)
                    )
                ]
            ),
            _info("FAILED_PRECONDITION"),
        ),
    )


def deadline(message: str) -> RpcError:
    """DEADLINE_EXCEEDED: the budget is spent, or cannot be met; retry-safe."""
    return RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, message, (_info("DEADLINE_EXCEEDED"),))


def stale(message: str) -> RpcError:
    """ABORTED: the attempt or the pool's epoch is not the current one; retry-safe."""
    return RpcError(grpc.StatusCode.ABORTED, message, (_info("ABORTED"),))


def internal(error: BaseException) -> RpcError:
    """INTERNAL: a bug. The stack goes to the log only, under the incident id that the client gets."""
    incident = secrets.token_hex(6)
    log.error("incident %s", incident, exc_info=error)
    return RpcError(
        grpc.StatusCode.INTERNAL,
        f"an internal error happened; the server's log has it as incident {incident}",
        (error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"incident_id": incident}),),
    )


def _cut(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """So many bytes of a text at most, its end left out if it is longer."""
    data = text.encode(errors="replace")
    return text if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def to_trailers(error: RpcError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries google.rpc.Status."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    for detail in error.details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return ((DETAILS_KEY, status.SerializeToString()),)


_DETAIL_TYPES: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.QuotaFailure,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
    )
}


def from_grpc(error: grpc.RpcError) -> RpcError:
    """A peer's status, details included, as an RpcError that can be raised or passed on."""
    assert isinstance(error, grpc.aio.AioRpcError)
    details: list[Message] = []
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        status = status_pb2.Status()
        status.ParseFromString(value if isinstance(value, bytes) else value.encode())
        for packed in status.details:
            if kind := _DETAIL_TYPES.get(packed.TypeName()):
                detail = kind()
                packed.Unpack(detail)
                details.append(detail)
    return RpcError(error.code(), error.details() or code_pb2.Code.Name(error.code().value[0]), tuple(details))


async def abort(context: grpc.aio.ServicerContext, error: RpcError) -> None:
    """Ends a call with the error's status and details."""
    context.set_trailing_metadata(to_trailers(error))
    await context.abort(error.code, error.message)


def handler(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a servicer's method, unary (async def) or streaming (async generator): RpcError becomes a status.

    Cancellation passes through: it is how a client's end reaches the work.
    """
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
            replies = method(self, request, context)
            try:
                async for reply in replies:
                    yield reply
            except Exception as error:
                await _fail(context, error)
            finally:
                await replies.aclose()

        return stream

    @functools.wraps(method)
    async def unary(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _fail(context, error)

    return unary


async def _fail(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if isinstance(error, (grpc.aio.AbortError, asyncio.CancelledError)):
        raise error
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_grpc(error)
    await abort(context, error if isinstance(error, RpcError) else internal(error))


class Health:
    """grpc.health.v1 over a server's services, and reflection. `set` is idempotent and cheap."""

    def __init__(self, server: grpc.aio.Server, service_names: list[str]) -> None:
        self._services = service_names
        # `aio` is public in grpcio-health-checking; the type stubs do not know it
        self._servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._serving: bool | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection([*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    async def set(self, serving: bool) -> None:
        """Turns every service, and the server as a whole, SERVING or NOT_SERVING."""
        if serving == self._serving:
            return
        self._serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._servicer.set(name, status)


async def serve_until(stop: Awaitable[Any], server: grpc.aio.Server, grace_s: float) -> None:
    """Serves until `stop` is done, then lets running calls end within `grace_s` seconds."""
    await server.start()
    try:
        await stop
    finally:
        await server.stop(grace_s)
