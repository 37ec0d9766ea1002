"""Keys over a real socket: every kind of call is turned away without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tandem.v1 import decode_pb2, decode_pb2_grpc, worker_pb2, worker_pb2_grpc

from shared.auth import OPEN, Access, RequireKey, send_key
from shared.config import ApiKey
from shared.rpc import Health, RpcError, connect, create_server, from_grpc, handler

KEYS = (
    ApiKey(name="alice", key=SecretStr("alice-secret")),
    ApiKey(name="bob", key=SecretStr("bob-secret"), models=("small",), max_running=1),
)


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    @handler
    async def GetInfo(self, request: worker_pb2.GetInfoRequest, context: Any) -> worker_pb2.GetInfoResponse:
        return worker_pb2.GetInfoResponse(worker_id="w")

    @handler
    async def WatchLoad(self, request: worker_pb2.WatchLoadRequest, context: Any) -> Any:
        yield worker_pb2.WatchLoadResponse(running=1)


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    @handler
    async def Decode(self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Any) -> Any:
        async for _ in request_iterator:
            yield decode_pb2.DecodeResponse()


@pytest.fixture
async def target() -> AsyncIterator[str]:
    server = create_server(interceptors=[RequireKey(Access(KEYS))])
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Decode(), server)
    health = Health(server, ["tandem.v1.WorkerService"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set(True)
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def calls(channel: grpc.aio.Channel) -> None:
    await worker_pb2_grpc.WorkerServiceStub(channel).GetInfo(worker_pb2.GetInfoRequest())


async def watch(channel: grpc.aio.Channel) -> None:
    async for _ in worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest()):
        pass


async def decode(channel: grpc.aio.Channel) -> None:
    call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
    # nothing is sent: of a call that is turned away before a message has left grpc.aio's own write makes INTERNAL
    await call.done_writing()
    async for _ in call:
        pass


@pytest.mark.parametrize("call", [calls, watch, decode])
@pytest.mark.parametrize("key", [None, "", "wrong", "alice-secre", "alice-secret2"])
async def test_without_the_key_every_call_is_unauthenticated(target: str, call: Any, key: str | None) -> None:
    interceptors = [] if key is None else send_key(SecretStr(key))
    async with connect(target, interceptors=interceptors) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
    error = from_grpc(caught.value)
    assert error.code == grpc.StatusCode.UNAUTHENTICATED
    assert "secret" not in error.message


@pytest.mark.parametrize("call", [calls, watch, decode])
async def test_with_the_key_every_call_passes(target: str, call: Any) -> None:
    async with connect(target, interceptors=send_key(SecretStr("alice-secret"))) as channel:
        await call(channel)


async def test_health_needs_no_key(target: str) -> None:
    async with connect(target) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_models_and_quota() -> None:
    access = Access(KEYS)
    bob = access.identify("Bearer bob-secret")
    with pytest.raises(RpcError) as denied, access.admit(bob, "large"):
        pass
    assert denied.value.code == grpc.StatusCode.PERMISSION_DENIED
    with access.admit(bob, "small"):
        with pytest.raises(RpcError) as quota, access.admit(bob, "small"):
            pass
        assert quota.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert quota.value.retry_after_s == 1
        assert any(isinstance(d, error_details_pb2.QuotaFailure) for d in quota.value.details)
    with access.admit(bob, "small"):
        pass


def test_without_keys_all_are_let_in() -> None:
    assert Access(()).identify(None) is OPEN
