"""The gRPC port: statuses and their details, keys, quotas, deadlines; and the process, at its start and its end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from shared.config import ApiKey
from shared.model_store import ModelStore
from shared.rpc import RpcError, connect, from_grpc
from tests.scripted_scene import Scene, request, scene_of
from tests.scripted_workers import TOKENIZER, ScriptedDecode, ScriptedPrefill, expected_tokens

ROOT = Path(__file__).parents[2]
PROMPT = TOKENIZER.encode("hello world")
KEYS = (
    ApiKey(name="alice", key=SecretStr("alice-secret"), max_running=1),
    ApiKey(name="bob", key=SecretStr("bob-secret"), models=("another",)),
    ApiKey(name="carol", key=SecretStr("carol-secret")),
)


def key(name: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {name}-secret"),)


async def status(call: Any) -> RpcError:
    """How a stream that fails ends."""

    async def read_all() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read_all()
    return from_grpc(error.value)


async def test_errors_carry_their_details(scene: Scene) -> None:
    error = await status(scene.stub.Generate(request(top_p=2, n=0)))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p")
    assert "sampling.n: " in error.message
    error = await status(scene.stub.Generate(request(model="gpt-17")))
    assert error.code == grpc.StatusCode.NOT_FOUND
    await scene.decode.kill()
    await scene.gone(scene.decode)
    error = await status(scene.stub.Generate(request()))
    assert (error.code, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1)


async def test_a_full_gateway_says_when_to_come_back() -> None:
    async with scene_of(max_running=1, max_queued=0) as scene:
        scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
        first = scene.stub.Generate(request(max_tokens=50))
        await first.read()
        error = await status(scene.stub.Generate(request()))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s
        first.cancel()
        await scene.idle()


@pytest.mark.parametrize("queued", [False, True])
async def test_the_clients_deadline_is_the_budget_of_everything(queued: bool) -> None:
    async with scene_of(max_running=1) as scene:
        scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
        first = scene.stub.Generate(request(max_tokens=50))
        await first.read()
        if not queued:
            first.cancel()
            await scene.idle()
        error = await status(scene.stub.Generate(request(), timeout=0.2))
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        first.cancel()
        await scene.idle()
        assert 'code="DEADLINE_EXCEEDED"' in scene.gateway.metrics.render().decode()


async def test_a_default_budget_without_a_deadline() -> None:
    async with scene_of(default_deadline_s=0.2) as scene:
        scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
        error = await status(scene.stub.Generate(request(max_tokens=50)))
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "budget of 0.2 s was spent while tokens were generated" in error.message
        await scene.idle()


async def test_keys_and_quotas() -> None:
    async with scene_of(auth={"api_keys": KEYS}) as scene:
        scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
        error = await status(scene.stub.Generate(request()))
        assert error.code == grpc.StatusCode.UNAUTHENTICATED
        error = await status(scene.stub.Generate(request(), metadata=key("bob")))
        assert error.code == grpc.StatusCode.PERMISSION_DENIED
        first = scene.stub.Generate(request(max_tokens=50), metadata=key("alice"))
        await first.read()
        error = await status(scene.stub.Generate(request(), metadata=key("alice")))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await scene.idle()
        scene.decode.script = ScriptedDecode.generate
        [_ async for _ in scene.stub.Generate(request(request_id="r1"), metadata=key("alice"))]
        resume = inference_pb2.ResumeRequest(request_id="r1")
        error = await status(scene.stub.Resume(resume, metadata=key("carol")))
        assert error.code == grpc.StatusCode.NOT_FOUND
        rest = [reply.chunk async for reply in scene.stub.Resume(resume, metadata=key("alice"))]
        assert list(rest[0].outputs[0].token_ids) == expected_tokens(PROMPT, 6)


async def test_a_gateway_that_stops_refuses_and_lets_the_others_end(scene: Scene) -> None:
    scene.decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
    call = scene.stub.Generate(request(max_tokens=50))
    await call.read()
    await scene.gateway.drain(0.01)
    error = await status(scene.stub.Generate(request()))
    assert error.code == grpc.StatusCode.UNAVAILABLE
    await scene.gateway.cancel()
    error = await status(call)
    assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "the gateway is shutting down")


# -- the process ------------------------------------------------------------------------------------------------------


class Process:
    """`python -m gateway` before scripted workers."""

    def __init__(self, folder: Path, prefill: ScriptedPrefill, decode: ScriptedDecode, **settings: Any) -> None:
        values = {
            "model": str(folder),
            "served_name": "scripted",
            "gateway.port": 0,
            "gateway.http_port": 0,
            "gateway.prefill_workers": prefill.target,
            "gateway.decode_workers": decode.target,
            **settings,
        }
        flags = [flag for name, value in values.items() for flag in ("--set", f"{name}={value}")]
        self.command = [sys.executable, "-m", "gateway", *flags]

    async def __aenter__(self) -> Process:
        self.process = await asyncio.create_subprocess_exec(
            *self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    async def ready(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(await self.process.stdout.readline())

    async def stopped(self, number: signal.Signals | None = None) -> tuple[int | None, str]:
        if number is not None:
            self.process.send_signal(number)
        _, errors = await self.process.communicate()
        return self.process.returncode, errors.decode()


@pytest.fixture
async def workers(default_model: Path) -> Any:
    prefill, decode = ScriptedPrefill("p0"), ScriptedDecode("d0")
    for worker in (prefill, decode):
        worker.layout = {"model_digest": ModelStore().resolve(str(default_model)).digest}
        worker.info = {"vocab_size": 49_152}
        await worker.start()
    yield prefill, decode
    for worker in (prefill, decode):
        await worker.kill()


async def test_the_process_serves_and_ends(default_model: Path, workers: Any) -> None:
    async with Process(default_model, *workers) as gateway:
        line = await gateway.ready()
        assert (line["event"], line["role"], line["pid"]) == ("ready", "gateway", gateway.process.pid)
        async with connect(line["grpc"]) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            tokens = [70, 71, 72]
            chunks = [chunk async for chunk in stub.Generate(request(tokens))]
            assert [token for chunk in chunks for token in chunk.outputs[0].token_ids] == expected_tokens(tokens, 6)
            health = health_pb2_grpc.HealthStub(channel)
            check = health_pb2.HealthCheckRequest(service="tandem.v1.InferenceService")
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(check)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await workers[1].kill()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        host, port = line["http"].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b" 503 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
        exit_status, errors = await gateway.stopped(signal.SIGTERM)
        assert (exit_status, "Traceback" in errors) == (0, False)


async def test_a_request_in_progress_gets_drain_s_to_end(default_model: Path, workers: Any) -> None:
    prefill, decode = workers
    decode.script = lambda worker, conversation: worker.generate_then_hang(conversation, 1)
    async with Process(default_model, prefill, decode, drain_s=0.2) as gateway:
        line = await gateway.ready()
        async with connect(line["grpc"]) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([70, 71], max_tokens=50))
            await call.read()
            gateway.process.send_signal(signal.SIGINT)
            error = await status(call)
            assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "the gateway is shutting down")
        exit_status, errors = await gateway.stopped()
        assert (exit_status, "Traceback" in errors) == (0, False)


async def test_the_process_can_be_stopped_while_it_waits_for_workers(default_model: Path, workers: Any) -> None:
    prefill, decode = workers
    await decode.kill()
    async with Process(default_model, prefill, decode) as gateway:
        assert gateway.process.stderr
        while b"is alive" not in await gateway.process.stderr.readline():
            pass
        exit_status, errors = await gateway.stopped(signal.SIGTERM)
        assert (exit_status, "Traceback" in errors) == (0, False)


@pytest.mark.parametrize("cause", ["digest", "transport", "port", "model"])
async def test_the_process_says_why_it_cannot_start(default_model: Path, workers: Any, cause: str) -> None:
    prefill, decode = workers
    settings: dict[str, Any] = {}
    if cause == "digest":
        decode.layout = {"model_digest": "another"}
        wanted = "layout.model_digest: "
    elif cause == "transport":
        decode.transport = types_pb2.TRANSPORT_INLINE
        settings = {"transport.require": "shared_memory"}
        wanted = "transport.require: "
    elif cause == "port":
        settings = {"gateway.port": int(decode.target.rpartition(":")[2])}
        wanted = "gateway: "
    else:
        settings = {"model": "no-such-model"}
        wanted = "no model 'no-such-model' here"
    async with Process(default_model, prefill, decode, **settings) as gateway:
        exit_status, errors = await gateway.stopped()
        assert exit_status == 1
        assert wanted in errors
        assert "Traceback" not in errors


def test_torch_is_not_loaded() -> None:
    code = "import sys, gateway.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
