"""Errors keep their code, message and details over a real channel; health and reflection answer; bounds hold."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tandem.v1 import inference_pb2, inference_pb2_grpc

from shared import rpc
from shared.rpc import Health, connect, create_server, from_grpc, handler

SERVICE = "tandem.v1.InferenceService"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Does what the test puts into `act`, in a unary and in a streaming method."""

    act: Callable[[], object]

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    @handler
    async def Detokenize(self, request, context):
        self.act()
        return inference_pb2.DetokenizeResponse(text="text")

    @handler
    async def Generate(self, request, context):
        yield inference_pb2.GenerateResponse(request_id="first")
        try:
            self.act()
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def address(servicer: Servicer) -> AsyncIterator[str]:
    server = create_server(max_message_bytes=1 << 16)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    health = Health(server, [SERVICE])
    await health.set(True)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    servicer.health = health
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with connect(address) as channel:
        yield channel


def raises(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


CASES = {
    "invalid": (rpc.invalid("a.b", "is bad", ("c", "too")), grpc.StatusCode.INVALID_ARGUMENT),
    "not_found": (rpc.not_found("model", "x", "no x"), grpc.StatusCode.NOT_FOUND),
    "exhausted": (rpc.exhausted("full", retry_after_s=0.25), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "unavailable": (rpc.unavailable("draining", retry_after_s=2), grpc.StatusCode.UNAVAILABLE),
    "mismatch": (rpc.mismatch("layout.dtype", "float32 here"), grpc.StatusCode.FAILED_PRECONDITION),
    "deadline": (rpc.deadline("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    "stale": (rpc.stale("epoch 3"), grpc.StatusCode.ABORTED),
}


@pytest.mark.parametrize("name", CASES)
async def test_errors_keep_their_details_over_the_wire(name: str, servicer, channel):
    error, code = CASES[name]
    servicer.act = raises(error)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await stub.Detokenize(inference_pb2.DetokenizeRequest())
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        async for _ in stub.Generate(inference_pb2.GenerateRequest()):
            pass
    for raised in (unary, streamed):
        received = from_grpc(raised.value)
        assert received.code is code
        assert received.message == error.message
        assert received.details == error.details
        infos = [d for d in received.details if isinstance(d, error_details_pb2.ErrorInfo)]
        assert [(info.reason, info.domain) for info in infos] == [(code.name, "tandem")]


@pytest.mark.parametrize("text", ["A" * 100_000, "🚀" * 20_000, "\n" * 20_000])
async def test_what_an_error_quotes_does_not_drown_its_code(text: str, servicer, channel):
    """Clients take 8 KiB of trailing metadata, and make RESOURCE_EXHAUSTED, which is retry-safe, of more."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for error in (
        rpc.not_found("model", text, f"no {text}"),
        rpc.mismatch("layout.dtype", text),
        rpc.invalid(f"a[{text}]", text, *((f"field_{i}", text) for i in range(40))),
    ):
        servicer.act = raises(error)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Detokenize(inference_pb2.DetokenizeRequest())
        assert raised.value.code() is error.code
        assert from_grpc(raised.value).details == error.details


async def test_a_peers_error_passes_through_unchanged(servicer, channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    servicer.act = raises(rpc.exhausted("full", retry_after_s=0.25))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Detokenize(inference_pb2.DetokenizeRequest())
    servicer.act = raises(raised.value)
    with pytest.raises(grpc.aio.AioRpcError) as again:
        await stub.Detokenize(inference_pb2.DetokenizeRequest())
    assert from_grpc(again.value) == from_grpc(raised.value)
    assert from_grpc(again.value).retry_after_s == 0.25


def test_an_error_tells_its_field_and_delay():
    assert rpc.invalid("sampling.top_p", "must be at most 1").field == "sampling.top_p"
    assert rpc.invalid("a", "b", ("c", "d")).message == "a: b; c: d"
    assert rpc.exhausted("full").field is None
    assert rpc.exhausted("full", 0.125).retry_after_s == 0.125
    assert rpc.stale("old").retry_after_s is None
    assert str(rpc.stale("old")) == "ABORTED: old"


async def test_a_bug_leaves_as_an_incident_and_its_stack_stays_in_the_log(servicer, channel, caplog):
    servicer.act = raises(KeyError("secret"))
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Detokenize(inference_pb2.DetokenizeRequest())
    error = from_grpc(raised.value)
    assert error.code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message
    (info,) = error.details
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.metadata["incident_id"] in error.message
    (record,) = [record for record in caplog.records if info.metadata["incident_id"] in record.getMessage()]
    assert record.exc_info
    assert "secret" in str(record.exc_info[1])


async def test_a_clients_end_reaches_the_work(servicer, channel):
    servicer.act = lambda: None
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest())
    async for chunk in call:
        assert chunk.request_id == "first"
        call.cancel()
        break
    await asyncio.wait_for(servicer.cancelled.wait(), 10)


async def test_a_message_beyond_the_bound_is_refused(servicer, channel):
    servicer.act = lambda: None
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    await stub.Detokenize(inference_pb2.DetokenizeRequest(model="x" * 60_000))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Detokenize(inference_pb2.DetokenizeRequest(model="x" * 70_000))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_is_told_per_service_and_watchers_see_it_change(servicer, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await servicer.health.set(False)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name async for reply in call for service in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_server_that_comes_back_is_found_soon(servicer):
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    servicer.act = lambda: None
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.Detokenize(inference_pb2.DetokenizeRequest())
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Detokenize(inference_pb2.DetokenizeRequest())
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        back = create_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, back)
        assert back.add_insecure_port(f"127.0.0.1:{port}") == port
        await back.start()
        await stub.Detokenize(inference_pb2.DetokenizeRequest(), wait_for_ready=True, timeout=10)
        await back.stop(0)
