"""WorkerService: what both kinds of workers tell about themselves."""

from __future__ import annotations

import math
import platform
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import grpc
from tandem.v1 import worker_pb2, worker_pb2_grpc

from shared.load_board import LoadBoard
from shared.rpc import handler, invalid

DEFAULT_INTERVAL_S = 0.05
MAX_INTERVAL_S = 60.0


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """info: called anew for each GetInfo."""

    def __init__(self, info: Callable[[], worker_pb2.GetInfoResponse], board: LoadBoard) -> None:
        self._info = info
        self._board = board

    @handler
    async def GetInfo(
        self, request: worker_pb2.GetInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetInfoResponse:
        info = self._info()
        info.versions.update(
            {"python": platform.python_version(), **{name: version(name) for name in ("tandem", "torch", "grpcio")}}
        )
        return info

    @handler
    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        interval_s = request.interval_s or DEFAULT_INTERVAL_S
        if not (math.isfinite(interval_s) and 0 < interval_s <= MAX_INTERVAL_S):
            raise invalid("interval_s", f"must lie in (0, {MAX_INTERVAL_S:g}] seconds, got {request.interval_s}")
        async for load in self._board.watch(interval_s):
            yield load

    @handler
    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        self._board.drain()
        return worker_pb2.DrainResponse(running=self._board.running)
