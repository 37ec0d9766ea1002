"""Workers as processes: the ready line, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tandem.v1 import types_pb2

from shared.rpc import connect
from tests.workers import DecodeCall, Output, PrefillCall, Request, Result, hand_over, receive, sampling

MakeModel = Callable[[str], Path]
ROLES = ["prefill_worker", "decode_worker"]
READY_S = 60


@asynccontextmanager
async def process(
    role: str, model: Path, *arguments: str, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """A worker that is ready; killed at the end if it still runs."""
    section = role.removesuffix("_worker")
    settings = (f"model={model}", "dtype=float32", "threads=1", f"{section}.port=0", f"{section}.num_blocks=64")
    flags = [part for setting in settings for part in ("--set", setting)]
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", role, *flags, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    try:
        assert running.stdout is not None
        async with asyncio.timeout(READY_S):
            line = await running.stdout.readline()
        assert line, (await running.communicate())[1].decode()
        yield running, json.loads(line)
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def test_a_pair_serves_and_ends_with_status_0_and_no_socket_left(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    env = {"TMPDIR": str(tmp_path)}
    async with (
        process("prefill_worker", model, env=env) as (prefill, prefill_ready),
        process("decode_worker", model, env=env) as (decode, decode_ready),
    ):
        for ready, role, running in ((prefill_ready, ROLES[0], prefill), (decode_ready, ROLES[1], decode)):
            assert (ready["event"], ready["role"], ready["pid"], ready["http"]) == ("ready", role, running.pid, None)
            assert ready["worker_id"]
        channels = connect(prefill_ready["grpc"]), connect(decode_ready["grpc"])
        call = DecodeCall(channels[1], Request(list(range(5, 60)), sampling(max_tokens=30)))
        result = Result(reserved=await call.admit())
        await receive(call, result, await hand_over(call, channels[0], result))
        assert len(result.outputs[0].token_ids) == 30
        assert result.imported is not None

        health = health_pb2_grpc.HealthStub(channels[1])
        for name in ("", "tandem.v1.DecodeService", "tandem.v1.WorkerService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
        services = reflection_pb2_grpc.ServerReflectionStub(channels[0]).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = {service.name async for reply in services for service in reply.list_services_response.service}
        assert {"tandem.v1.PrefillService", "tandem.v1.KvService", "tandem.v1.WorkerService"} <= listed

        for channel in channels:
            await channel.close()
        for running in (prefill, decode):
            running.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            for running in (prefill, decode):
                _, stderr = await running.communicate()
                assert running.returncode == 0, stderr.decode()
                assert "Traceback" not in stderr.decode()
    assert os.listdir(tmp_path) == []


async def admission(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError | None:
    """Why a request is refused, or None when it is not."""
    call = DecodeCall(channel, Request([7] * 20, sampling()))
    try:
        await call.admit()
    except grpc.aio.AioRpcError as error:
        return error
    call.call.cancel()
    return None


async def test_sigterm_lets_what_runs_end(tiny_model: MakeModel) -> None:
    async with process("decode_worker", tiny_model("llama"), "--set", "drain_s=30") as (running, ready):
        channel = connect(ready["grpc"])
        call = DecodeCall(channel, Request([7] * 20, sampling(max_tokens=200)))
        result = Result(reserved=await call.admit())
        running.send_signal(signal.SIGTERM)
        refused = connect(ready["grpc"])
        async with asyncio.timeout(10):
            while (refusal := await admission(refused)) is None:
                pass
        assert refusal.code() == grpc.StatusCode.UNAVAILABLE, refusal.debug_error_string()
        await call.begin(1, local_prefill=True)
        await receive(call, result)
        assert len(result.outputs[0].token_ids) == 200
        await channel.close()
        await refused.close()
        async with asyncio.timeout(10):
            assert await running.wait() == 0


async def test_sigterm_cuts_off_what_does_not_end_in_time(tiny_model: MakeModel) -> None:
    async with process("prefill_worker", tiny_model("llama"), "--set", "drain_s=0.1") as (running, ready):
        channel = connect(ready["grpc"])
        call = PrefillCall(channel, Request([7] * 20, sampling()))
        await call.finish()
        running.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await running.wait() == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await call.call.read()
        await channel.close()


@pytest.mark.parametrize("disable", ["", "shared_memory"])
async def test_sigterm_leaves_an_export_until_it_is_imported(tiny_model: MakeModel, disable: str) -> None:
    """The decode worker has not even shaken hands with the prefill worker before that drains."""
    flags = "--set", f"transport.disable={disable}", "--set", "drain_s=30"
    async with (
        process("prefill_worker", tiny_model("llama"), *flags) as (prefill, prefill_ready),
        process("decode_worker", tiny_model("llama"), *flags) as (_, decode_ready),
    ):
        channels = connect(prefill_ready["grpc"]), connect(decode_ready["grpc"])
        call = DecodeCall(channels[1], Request([7] * 40, sampling(max_tokens=30)))
        result = Result(reserved=await call.admit())
        export = PrefillCall(channels[0], call.request)
        first = await export.finish()
        health = health_pb2_grpc.HealthStub(channels[0]).Watch(health_pb2.HealthCheckRequest())
        prefill.send_signal(signal.SIGTERM)
        while (await health.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        health.cancel()
        for extent in export.extents:
            await call.import_blocks(1, extent)
        await call.begin(1, first.tokens)
        result.outputs[0] = Output(token_ids=[first.tokens[0].token_id])
        await receive(call, result, export)
        assert result.imported is not None
        assert (result.imported.transport == types_pb2.TRANSPORT_INLINE) == bool(disable)
        assert len(result.outputs[0].token_ids) == 30
        async with asyncio.timeout(10):
            assert await prefill.wait() == 0
        for channel in channels:
            await channel.close()


async def test_a_worker_dies_with_its_parent(tiny_model: MakeModel) -> None:
    """The parent is a shell that waits; killing it leaves the worker an orphan, but for the flag."""
    flags = f"--set model={tiny_model('llama')} --set threads=1 --set decode.port=0 --set decode.num_blocks=8"
    command = f"{sys.executable} -m decode_worker {flags} --die-with-parent & wait"
    parent = await asyncio.create_subprocess_exec(
        "sh", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert parent.stdout is not None
    async with asyncio.timeout(READY_S):
        ready = json.loads(await parent.stdout.readline())
        os.kill(ready["pid"], 0)
        parent.kill()
        # the pipe's last writer is the worker
        assert await parent.stdout.read() == b""
    await parent.wait()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("decode.prot=1", "decode.prot"),
        ("model=/nowhere", "/nowhere"),
        ("decode.host=no-such-host.invalid", "decode.host: no-such-host.invalid:0 cannot be listened on"),
    ],
)
async def test_a_start_that_fails_says_why(tiny_model: MakeModel, setting: str, named: str) -> None:
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "decode_worker", "--set", f"model={tiny_model('llama')}", "--set", "decode.port=0"),
        *("--set", setting),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(READY_S):
        stdout, stderr = await running.communicate()
    assert running.returncode in (1, 2)
    assert stdout == b""
    assert named in stderr.decode()
    assert "Traceback" not in stderr.decode()
