"""When nobody is left to go on with, and when processes come back: errors within their bounds, and nothing held."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from tandem.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc, types_pb2

from cli.process import StartError
from cli.supervisor import ROOT
from tests.cluster import Cluster
from tests.e2e.faults import Stream, ask, failure, prompt

Code = grpc.StatusCode
RECOVERY_WAIT_S = 1.0
MARGIN_S = 1.5  # of a busy machine
LONG = 400


@pytest.fixture(scope="module")
async def service(tiny_model: Callable[[str], Path]) -> AsyncIterator[Cluster]:
    """One of each kind, and nobody who starts them again but the tests."""
    settings = {
        "dtype": "float32",
        "max_context": 1024,
        "prefill.num_blocks": 128,
        "decode.num_blocks": 128,
        "prefill.chunk_tokens": 16,
        "gateway.recovery_wait_s": RECOVERY_WAIT_S,
    }
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
async def nothing_is_left(service: Cluster) -> AsyncIterator[None]:
    """With no further traffic nothing stays held; then whoever was killed comes back."""
    yield
    await service.settled()
    for member in service.members:
        if not member.alive:
            await member.restart()
    await service.known(*service.workers)


async def test_decode_dead_for_good(service: Cluster) -> None:
    """A stream waits for another worker as long as it was told to, then says so; new requests do not wait at all.

    SGLang #29482: one failed leg held the other for 1,800 s.
    """
    request = ask(prompt(40), max_tokens=LONG)
    undisturbed = await service.generate(request)
    stream = Stream(service.stub.Generate(request))
    await stream.until(20)
    await service.decode[0].kill()
    killed_s = time.monotonic()
    ending = asyncio.create_task(failure(stream.call))
    # from before the gateway has noticed to long after
    while not ending.done():
        asked_s = time.monotonic()
        error = await failure(service.stub.Generate(ask(prompt(40), max_tokens=4)))
        assert time.monotonic() - asked_s < 1.0
        assert error.code == Code.UNAVAILABLE
        assert error.retry_after_s
    error = await ending
    assert RECOVERY_WAIT_S * 0.8 < time.monotonic() - killed_s < RECOVERY_WAIT_S + MARGIN_S
    assert error.code == Code.UNAVAILABLE
    assert error.retry_after_s
    # nobody computed a prompt that has nowhere to go
    await service.settled()
    await service.decode[0].restart()
    await service.known(service.decode[0])
    assert (await service.generate(request)).outputs == undisturbed.outputs


async def test_prefill_unreachable_for_decode(service: Cluster) -> None:
    """Blocks are announced at an address where nobody listens: the stream fails at once, and holds nothing then."""
    info = await service.info(service.prefill[0])
    request = ask(prompt(40), max_tokens=8)
    resolved = (await service.generate(request)).resolved
    call = decode_pb2_grpc.DecodeServiceStub(service.channel(service.decode[0].grpc)).Decode()
    admit = decode_pb2.Admit(
        token_ids=request.token_ids.ids, num_prompt_tokens=40, sampling=resolved, output_indices=[0], cache_salt="x"
    )
    await call.write(decode_pb2.DecodeRequest(admit=admit))
    assert (await call.read()).HasField("reserved")
    extent = kv_pb2.KvExtent(
        kv_endpoint="127.0.0.1:1",
        epoch=info.epoch,
        layout_digest=info.layout.digest,
        block_ids=[1, 2, 3],
        num_tokens=40,
        export_id="nowhere",
    )
    asked_s = time.monotonic()
    await call.write(decode_pb2.DecodeRequest(import_blocks=decode_pb2.ImportBlocks(attempt=1, extent=extent)))
    error = await failure(call)
    assert error.code == Code.UNAVAILABLE
    assert time.monotonic() - asked_s < 1.0


async def test_no_prefill_worker_left(service: Cluster) -> None:
    """Killed in mid-prefill, with no other: decode computes the prompt itself, to the same bits."""
    request = ask(prompt(900), max_tokens=12, temperature=0.9, seed=3, prompt_logprobs=1)
    undisturbed = await service.generate(request)
    reading = asyncio.create_task(service.generate(request))
    await service.until(service.prefill, lambda load: 0 < load.queued_tokens < 700)
    await service.prefill[0].kill()
    result = await reading
    assert result.outputs == undisturbed.outputs
    assert result.prompt_logprobs == undisturbed.prompt_logprobs
    assert result.receipt.attempts == 2
    assert not result.receipt.prefill_workers
    assert result.receipt.transport == types_pb2.TRANSPORT_UNSPECIFIED
    # and so it does from the start, as long as none is there
    assert (await service.generate(request)).outputs == undisturbed.outputs


async def test_gateway_killed(service: Cluster) -> None:
    """Its streams were the leases: what the workers held for them is free, and a new gateway serves."""
    request = ask(prompt(50), max_tokens=LONG, n=2, temperature=1, seed=1)
    streams = [Stream(service.stub.Generate(request)) for _ in range(4)]
    waiting = [service.stub.Generate(ask(prompt(700, seed), max_tokens=200)) for seed in range(8)]
    for stream in streams:
        await stream.until(5)
    await service.gateway.kill()
    for call in [*(stream.call for stream in streams), *waiting]:
        assert (await failure(call)).code == Code.UNAVAILABLE
    await service.settled()
    await service.gateway.restart()
    await service.generate(request)


CLIENT = """
import sys, grpc
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2
stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
ids = inference_pb2.TokenIds(ids=range(3, 203))
calls = [
    stub.Generate(inference_pb2.GenerateRequest(
        token_ids=ids, cache_salt=str(i), sampling=types_pb2.SamplingParams(max_tokens=600, ignore_eos=True)))
    for i in range(40)
]
for chunk in calls[0]:
    pass
"""


async def test_client_killed_with_the_pool_full(service: Cluster) -> None:
    """Forty requests, of which the pool takes eight: all are given up with their client, and no request follows."""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, service.grpc_target, env={"PYTHONPATH": str(ROOT)}
    )
    await service.until(service.decode, lambda load: load.waiting > 20 and load.free_blocks < 16)
    client.send_signal(signal.SIGKILL)
    await client.wait()
    await service.settled()
    await service.generate(ask(prompt(16), max_tokens=4))


async def test_a_worker_comes_back_with_another_layout(service: Cluster) -> None:
    """It is not used, and everyone who asks is told in which field it differs."""
    seen = len(service.log)
    await service.decode[0].restart({"kv_dtype": "int8"})
    await service.logged("is not used", "layout.dtype", after=seen)
    error = await failure(service.stub.Generate(ask(prompt(40), max_tokens=4)))
    assert error.code == Code.UNAVAILABLE
    stub = decode_pb2_grpc.DecodeServiceStub(service.channel(service.decode[0].grpc))
    error = await failure(stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=service.prefill[0].grpc)))
    assert error.code == Code.FAILED_PRECONDITION
    assert "layout.dtype" in error.message
    await service.decode[0].restart({"kv_dtype": "auto"})


async def test_every_layout_field_differs_in_turn(service: Cluster) -> None:
    info = await service.info(service.prefill[0])
    stub = kv_pb2_grpc.KvServiceStub(service.channel(service.prefill[0].grpc))
    for field in kv_pb2.KvLayout.DESCRIPTOR.fields:
        layout = kv_pb2.KvLayout()
        layout.CopyFrom(info.layout)
        value = getattr(layout, field.name)
        setattr(layout, field.name, value + 1 if isinstance(value, int) else value[::-1] + "x")
        request = kv_pb2.HandshakeRequest(layout=layout, transports=[types_pb2.TRANSPORT_INLINE])
        error = await failure(stub.Handshake(request))
        assert error.code == Code.FAILED_PRECONDITION, field.name
        # blocks of another size would be converted, were the digest that of these fields
        named = {"block_tokens": "digest", "first_kv_head": "head"}.get(field.name, field.name)
        assert named in error.message


@pytest.mark.slow  # tests/e2e/test_namespaces.py and tests/gateway/test_service.py show the same with fewer restarts
async def test_a_required_transport_that_cannot_be_had(service: Cluster) -> None:
    """Nobody falls back: the decode worker refuses the pair, and a gateway does not start on it."""
    await service.prefill[0].restart({"transport.disable": ["shared_memory"]})
    await service.known(service.prefill[0])
    result = await service.generate(ask(prompt(40), max_tokens=4))
    assert result.receipt.transport == types_pb2.TRANSPORT_INLINE
    await service.decode[0].restart({"transport.require": "shared_memory"})
    stub = decode_pb2_grpc.DecodeServiceStub(service.channel(service.decode[0].grpc))
    error = await failure(stub.Connect(decode_pb2.ConnectRequest(kv_endpoint=service.prefill[0].grpc)))
    assert error.code == Code.FAILED_PRECONDITION
    assert "transport.require" in error.message
    with pytest.raises(StartError, match=r"transport\.require"):
        await service.gateway.restart()
    await service.prefill[0].restart({"transport.disable": []})
    await service.gateway.restart()
    result = await service.generate(ask(prompt(40), max_tokens=4))
    assert result.receipt.transport == types_pb2.TRANSPORT_SHARED_MEMORY
