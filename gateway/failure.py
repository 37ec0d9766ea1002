"""How a worker's failure is told from a request's: the one is recovered from, the other is the client's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2

from shared.rpc import RpcError, from_grpc, unavailable

# CANCELLED: a worker that stops ends its streams so. UNKNOWN: what grpc makes of a connection that breaks oddly.
_OF_THE_WORKER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


@dataclass
class WorkerFailed(Exception):
    """A worker ended a stream before its time. error: the status it left."""

    worker_id: str
    error: RpcError

    def __str__(self) -> str:
        return f"{self.worker_id}: {self.error}"

    @property
    def recoverable(self) -> bool:
        """Whether the request may succeed elsewhere, or here a moment later."""
        if self.error.code == grpc.StatusCode.INTERNAL:
            # a broken connection may read so; a bug of the worker's carries its incident id, and would strike again
            return not any(isinstance(detail, error_details_pb2.ErrorInfo) for detail in self.error.details)
        return self.error.code in _OF_THE_WORKER

    @property
    def full(self) -> bool:
        """Whether the worker is alive and has no place."""
        return self.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED


class DecodeFailed(WorkerFailed):
    """The Decode stream failed, and with it the reservation."""


class PrefillFailed(WorkerFailed):
    """The Prefill stream failed, and with it the export."""


async def status_of(call: grpc.aio.Call) -> RpcError:
    """The status of a call that has ended."""
    code = await call.code()
    if code == grpc.StatusCode.OK:
        return unavailable("the worker ended the stream before its last token")
    return from_grpc(
        grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), await call.details())
    )


async def read(call: Any, worker_id: str, failure: type[WorkerFailed]) -> Any:
    """The next message of a stream that may not end yet."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise failure(worker_id, from_grpc(error)) from None
    if message is grpc.aio.EOF:
        raise failure(worker_id, await status_of(call))
    return message


async def write(call: Any, message: Any) -> None:
    """Sends a message on a stream that may have ended: then it goes nowhere, and reading the stream says why.

    grpc.aio's own write would give such a call up as INTERNAL: its status and what was not yet read are lost, cancel()
    takes the call for done, and a task waits for its end for ever. So the message goes to the call underneath.
    """
    try:
        await call.wait_for_connection()
        await call._cython_call.send_serialized_message(message.SerializeToString())
    except (grpc.aio.AioRpcError, grpc.aio.InternalError):
        pass


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs all; the first to fail cancels the others and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
