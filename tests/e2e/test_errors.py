"""Every row of the error table, provoked over the wire: the code, what it names, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tandem.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    kv_pb2,
    kv_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

from shared.auth import send_key
from shared.config import load_config
from shared.rpc import RpcError, connect, create_server, from_grpc, handler
from tests.cluster import Cluster

Code = grpc.StatusCode


async def failure(call: Any) -> RpcError:
    """The error that a call ends with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return from_grpc(error)
    raise AssertionError("the call succeeded")


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    sampling = fields.pop("sampling", {})
    message = inference_pb2.GenerateRequest(**fields)
    message.sampling.CopyFrom(types_pb2.SamplingParams(**{"max_tokens": 4, **sampling}))
    if message.WhichOneof("prompt") is None:
        message.text = "Hello"
    return message


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    settings = {"max_context": 256, "prefill.num_blocks": 64, "decode.num_blocks": 64}
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        yield cluster


BAD_FIELDS = [
    ("sampling.temperature", {"sampling": {"temperature": -1.0}}),
    ("sampling.temperature", {"sampling": {"temperature": float("nan")}}),
    ("sampling.top_p", {"sampling": {"top_p": 0.0}}),
    ("sampling.top_p", {"sampling": {"top_p": 1.5}}),
    ("sampling.min_p", {"sampling": {"min_p": 2.0}}),
    ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": 0.0}}),
    ("sampling.presence_penalty", {"sampling": {"presence_penalty": float("inf")}}),
    ("sampling.n", {"sampling": {"n": 0}}),
    ("sampling.n", {"sampling": {"n": 1000}}),
    ("sampling.max_tokens", {"sampling": {"max_tokens": 0}}),
    ("sampling.max_tokens", {"sampling": {"max_tokens": 256}}),
    ("sampling.min_tokens", {"sampling": {"min_tokens": 5}}),
    ("sampling.stop", {"sampling": {"stop": [""]}}),
    ("sampling.stop_token_ids", {"sampling": {"stop_token_ids": [100_000]}}),
    ("sampling.logit_bias", {"sampling": {"logit_bias": {100_000: 1.0}}}),
    ("sampling.logprobs", {"sampling": {"logprobs": 10_000}}),
    ("sampling.grammar", {"sampling": {"grammar": types_pb2.Grammar(json_object=True)}}),
    ("token_ids", {"token_ids": inference_pb2.TokenIds()}),
    ("token_ids", {"token_ids": inference_pb2.TokenIds(ids=[1, 100_000])}),
    ("token_ids", {"token_ids": inference_pb2.TokenIds(ids=[5] * 300)}),
    ("messages", {"messages": inference_pb2.ChatMessages()}),
    ("request_id", {"request_id": "x" * 1000}),
    ("cache_salt", {"cache_salt": "x" * 10_000}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_FIELDS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(BAD_FIELDS)])
async def test_a_bad_parameter_is_named(service: Cluster, field: str, fields: dict[str, Any]) -> None:
    error = await failure(service.stub.Generate(request(**fields)))
    assert error.code == Code.INVALID_ARGUMENT, error
    assert error.field is not None
    assert error.field.startswith(field), error
    assert error.retry_after_s is None


async def test_a_prompt_is_needed(service: Cluster) -> None:
    error = await failure(service.stub.Generate(inference_pb2.GenerateRequest()))
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "prompt")


async def test_one_token_over_the_context(service: Cluster) -> None:
    fits = request(token_ids=inference_pb2.TokenIds(ids=[5] * 252), sampling={"ignore_eos": True})
    assert len((await service.generate(fits)).outputs[0].token_ids) == 4
    over = request(token_ids=inference_pb2.TokenIds(ids=[5] * 253))
    error = await failure(service.stub.Generate(over))
    assert error.code == Code.INVALID_ARGUMENT
    assert error.field in ("sampling.max_tokens", "token_ids")


async def test_unknown_model(service: Cluster) -> None:
    error = await failure(service.stub.Generate(request(model="gpt-17")))
    assert error.code == Code.NOT_FOUND
    [info] = [d for d in error.details if isinstance(d, error_details_pb2.ResourceInfo)]
    assert info.resource_name == "gpt-17"


async def test_unknown_request_to_resume(service: Cluster) -> None:
    error = await failure(service.stub.Resume(inference_pb2.ResumeRequest(request_id="never seen")))
    assert error.code == Code.NOT_FOUND


async def test_deadline_passed_in_mid_stream(service: Cluster) -> None:
    long = request(sampling={"max_tokens": 240, "ignore_eos": True}, text="Hi")
    error = await failure(service.stub.Generate(long, timeout=0.03))
    assert error.code == Code.DEADLINE_EXCEEDED
    await service.settled()


async def test_layouts_that_differ(service: Cluster) -> None:
    """A decode worker that presents another layout is told in which field."""
    info = await service.info(service.prefill[0])
    stub = kv_pb2_grpc.KvServiceStub(service.channel(service.prefill[0].grpc))
    for field, value in (("first_kv_head", 7), ("dtype", "int8"), ("model_digest", "0" * 64), ("num_layers", 99)):
        layout = kv_pb2.KvLayout()
        layout.CopyFrom(info.layout)
        setattr(layout, field, value)
        error = await failure(
            stub.Handshake(kv_pb2.HandshakeRequest(layout=layout, transports=[types_pb2.TRANSPORT_SHARED_MEMORY]))
        )
        assert error.code == Code.FAILED_PRECONDITION
        assert field in error.message


async def test_stale_epoch(service: Cluster) -> None:
    info = await service.info(service.prefill[0])
    stub = kv_pb2_grpc.KvServiceStub(service.channel(service.prefill[0].grpc))
    fetch = kv_pb2.FetchRequest(export_id="x", epoch=info.epoch + 1, block_ids=[1])
    assert (await failure(stub.Fetch(fetch))).code == Code.ABORTED


async def test_workers_check_what_the_gateway_sends(service: Cluster) -> None:
    """The internal services name fields too: nothing from the wire reaches an assertion."""
    prefill = prefill_pb2_grpc.PrefillServiceStub(service.channel(service.prefill[0].grpc))
    error = await failure(prefill.Prefill(prefill_pb2.PrefillRequest(token_ids=[1, 2, 3])))
    assert error.code == Code.INVALID_ARGUMENT
    assert error.field
    decode = decode_pb2_grpc.DecodeServiceStub(service.channel(service.decode[0].grpc))
    for first in (
        decode_pb2.DecodeRequest(),
        decode_pb2.DecodeRequest(begin=decode_pb2.Begin()),
        decode_pb2.DecodeRequest(admit=decode_pb2.Admit(token_ids=[1])),
    ):
        call = decode.Decode()
        await call.write(first)
        error = await failure(call)
        assert error.code == Code.INVALID_ARGUMENT
        assert error.field
    await service.settled()


@pytest.fixture(scope="module")
async def narrow(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """One request at a time, and one that waits."""
    settings = {"gateway.max_running": 1, "gateway.max_queued": 1, "max_context": 2048}
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        yield cluster


async def test_queue_full(narrow: Cluster) -> None:
    long = request(text="Hi", sampling={"max_tokens": 1500, "ignore_eos": True})
    running = narrow.stub.Generate(long)
    await running.read()
    queued = narrow.stub.Generate(request())
    refused = None
    # the second request may reach the queue after the third: one of the two is refused
    third = narrow.stub.Generate(request())
    done, _ = await asyncio.wait(
        {asyncio.ensure_future(failure(queued)), asyncio.ensure_future(failure(third))},
        return_when=asyncio.FIRST_COMPLETED,
    )
    refused = done.pop().result()
    assert refused.code == Code.RESOURCE_EXHAUSTED
    assert refused.retry_after_s
    for call in (running, queued, third):
        call.cancel()
    await narrow.settled()


async def test_no_worker_alive_or_all_drain(narrow: Cluster) -> None:
    """The last of its cluster: a worker that drains takes nothing new until it is started again."""
    await narrow.generate(request())
    await narrow.decode[0].kill()
    error = await failure(narrow.stub.Generate(request(), timeout=20))
    assert error.code == Code.UNAVAILABLE
    assert error.retry_after_s
    health = health_pb2_grpc.HealthStub(narrow.channel(narrow.grpc_target))
    async for reply in health.Watch(health_pb2.HealthCheckRequest()):
        if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            break

    await narrow.decode[0].restart()
    await narrow.known(narrow.decode[0])
    await narrow.generate(request())
    for member in narrow.workers:
        await worker_pb2_grpc.WorkerServiceStub(narrow.channel(member.grpc)).Drain(worker_pb2.DrainRequest())
    error = await failure(narrow.stub.Generate(request(), timeout=20))
    assert error.code == Code.UNAVAILABLE
    assert error.retry_after_s


KEYS = """
auth:
  cluster_key: between-us
  api_keys:
    - {name: alice, key: alice-secret, max_running: 1}
    - {name: bob, key: bob-secret, models: [another-model]}
"""


async def test_keys_and_quotas(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text(KEYS)
    keys = {key.name: key.key for key in load_config(path).auth.api_keys}
    async with Cluster(model=str(tiny_model("llama")), config_path=path, settings={"max_context": 2048}) as cluster:
        open_stub = cluster.stub
        assert (await failure(open_stub.Generate(request()))).code == Code.UNAUTHENTICATED
        assert (await failure(open_stub.ListModels(inference_pb2.ListModelsRequest()))).code == Code.UNAUTHENTICATED
        for member in cluster.workers:
            worker = worker_pb2_grpc.WorkerServiceStub(cluster.channel(member.grpc))
            assert (await failure(worker.GetInfo(worker_pb2.GetInfoRequest()))).code == Code.UNAUTHENTICATED
        async with (
            connect(cluster.grpc_target, interceptors=send_key(keys["alice"])) as alice,
            connect(cluster.grpc_target, interceptors=send_key(keys["bob"])) as bob,
        ):
            assert (
                await failure(inference_pb2_grpc.InferenceServiceStub(bob).Generate(request()))
            ).code == Code.PERMISSION_DENIED
            stub = inference_pb2_grpc.InferenceServiceStub(alice)
            first = stub.Generate(request(text="Hi", sampling={"max_tokens": 1500, "ignore_eos": True}))
            await first.read()
            error = await failure(stub.Generate(request()))
            assert error.code == Code.RESOURCE_EXHAUSTED
            assert error.retry_after_s
            assert any(isinstance(detail, error_details_pb2.QuotaFailure) for detail in error.details)
            first.cancel()


async def test_a_bug_is_internal_with_an_incident_id(caplog: pytest.LogCaptureFixture) -> None:
    """The layer that all services share, over a real socket; the stack stays in the log."""

    class Broken(worker_pb2_grpc.WorkerServiceServicer):
        @handler
        async def GetInfo(self, request: worker_pb2.GetInfoRequest, context: Any) -> worker_pb2.GetInfoResponse:
            raise KeyError("secret detail")

    server = create_server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Broken(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(f"127.0.0.1:{port}") as channel:
        error = await failure(worker_pb2_grpc.WorkerServiceStub(channel).GetInfo(worker_pb2.GetInfoRequest()))
    await server.stop(None)
    assert error.code == Code.INTERNAL
    [info] = [d for d in error.details if isinstance(d, error_details_pb2.ErrorInfo)]
    incident = info.metadata["incident_id"]
    assert incident in error.message
    assert "secret detail" not in error.message
    [record] = [r for r in caplog.records if incident in r.getMessage()]
    assert record.exc_info is not None
