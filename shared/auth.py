"""Who may call: bearer keys on every RPC of every process, the internal services included.

    gateway   auth.api_keys      keys of clients; none = open to all who reach the port
    workers   auth.cluster_key   one key that the gateway and the workers share; none = open likewise

Health checks need no key. Keys are compared in constant time and never logged.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from pydantic import SecretStr

from shared.config import ApiKey
from shared.rpc import RpcError, abort

SCHEME = "Bearer "
OPEN = ApiKey(name="anyone", key=SecretStr(""))


def unauthenticated(message: str) -> RpcError:
    """UNAUTHENTICATED: no key, or an unknown one."""
    return RpcError(
        grpc.StatusCode.UNAUTHENTICATED,
        message,
        (error_details_pb2.ErrorInfo(reason="UNAUTHENTICATED", domain="tandem"),),
    )


class Access:
    """The keys of a process, and what their owners have in progress."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)
        self._running: Counter[str] = Counter()

    def identify(self, authorization: str | None) -> ApiKey:
        """The key behind an `authorization` header. Raises UNAUTHENTICATED."""
        if not self._keys:
            return OPEN
        if not authorization or not authorization.startswith(SCHEME):
            raise unauthenticated("no key: send the header `authorization: Bearer <key>`")
        given = authorization.removeprefix(SCHEME).encode()
        # every key is compared, so that the time taken tells nothing of which one was close
        matches = [key for key in self._keys if hmac.compare_digest(key.key.get_secret_value().encode(), given)]
        if not matches:
            raise unauthenticated("the key is not known to this server")
        return matches[0]

    @contextmanager
    def admit(self, key: ApiKey, model: str) -> Iterator[None]:
        """Holds one of the key's places for a request. Raises PERMISSION_DENIED, over the quota RESOURCE_EXHAUSTED."""
        if key.models and model not in key.models:
            raise RpcError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"key {key.name!r} may not use model {model!r}; it may use {', '.join(key.models)}",
                (error_details_pb2.ErrorInfo(reason="PERMISSION_DENIED", domain="tandem"),),
            )
        if key.max_running is not None and self._running[key.name] >= key.max_running:
            raise _over_quota(key)
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1


def _over_quota(key: ApiKey) -> RpcError:
    text = f"key {key.name!r} has {key.max_running} requests in progress, which is its quota"
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(1)
    violation = error_details_pb2.QuotaFailure.Violation(subject=key.name, description=text)
    return RpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        text,
        (
            retry,
            error_details_pb2.QuotaFailure(violations=[violation]),
            error_details_pb2.ErrorInfo(reason="RESOURCE_EXHAUSTED", domain="tandem"),
        ),
    )


def bearer(metadata: Any) -> str | None:
    """The `authorization` value of a call's metadata."""
    return next((str(value) for key, value in metadata or () if key == "authorization"), None)


class RequireKey(grpc.aio.ServerInterceptor):
    """Turns calls without a known key away, before any handler sees them."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        details: Any = handler_call_details
        if not details.method.startswith(f"/{HEALTH}/"):
            try:
                self._access.identify(bearer(details.invocation_metadata))
            except RpcError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: RpcError) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    # answers calls of every kind with the status alone, and waits for no message of theirs
    return grpc.stream_stream_rpc_method_handler(refuse)


def send_key(key: SecretStr | None) -> list[grpc.aio.ClientInterceptor]:
    """Interceptors that add the key to every call of a channel; grpc.aio wants one object for each kind of call."""
    if key is None:
        return []
    return [kind(key) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]


class _Header:
    def __init__(self, key: SecretStr) -> None:
        self._header = ("authorization", SCHEME + key.get_secret_value())

    def add(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )


class _UnaryUnary(_Header, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add(client_call_details), request)


class _UnaryStream(_Header, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add(client_call_details), request)


class _StreamUnary(_Header, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.add(client_call_details), request_iterator)


class _StreamStream(_Header, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.add(client_call_details), request_iterator)
