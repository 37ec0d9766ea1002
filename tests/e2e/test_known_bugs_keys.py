"""vLLM #38295: a key that was asked for on one port was ignored on the other. Here every RPC of every service asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from pydantic import SecretStr
from tandem.v1 import decode_pb2, inference_pb2, inference_pb2_grpc, kv_pb2, prefill_pb2, worker_pb2, worker_pb2_grpc

from shared.auth import send_key
from shared.rpc import connect
from tests.cluster import Cluster, collect
from tests.e2e.faults import ask, failure, prompt

CLIENT, BETWEEN_US = "a-clients-key", "the-clusters-key"
SERVICES = {
    "gateway": (inference_pb2,),
    "prefill": (prefill_pb2, kv_pb2, worker_pb2),
    "decode": (decode_pb2, worker_pb2),
}


def methods(who: str) -> list[MethodDescriptor]:
    services = [found for module in SERVICES[who] for found in module.DESCRIPTOR.services_by_name.values()]
    return [method for found in services for method in found.methods]


def call(channel: grpc.aio.Channel, method: MethodDescriptor) -> Any:
    """An empty request, or an open stream of requests."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        return channel.stream_stream(path)(timeout=5)
    if method.server_streaming:
        return channel.unary_stream(path)(b"", timeout=5)
    return channel.unary_unary(path, response_deserializer=GetMessageClass(method.output_type).FromString)(
        b"", timeout=5
    )


async def test_every_call_needs_its_key(tiny_model: Callable[[str], Path]) -> None:
    settings = {
        "dtype": "float32",
        "auth.cluster_key": BETWEEN_US,
        "auth.api_keys": [{"name": "someone", "key": CLIENT}],
        "transport.disable": ["shared_memory"],  # so that decode calls prefill for each block
    }
    async with Cluster(model=str(tiny_model("llama")), settings=settings) as cluster:
        members = {"gateway": cluster.gateway, "prefill": cluster.prefill[0], "decode": cluster.decode[0]}
        for who, member in members.items():
            # none, one that nobody has, the one of the other kind of service
            for key in (None, "wrong", BETWEEN_US if who == "gateway" else CLIENT):
                async with connect(member.grpc, interceptors=send_key(SecretStr(key) if key else None)) as channel:
                    for method in methods(who):
                        error = await failure(call(channel, method))
                        assert error.code == grpc.StatusCode.UNAUTHENTICATED, f"{who} {method.name} with {key}: {error}"
        async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
            for path in ("/v1/completions", "/v1/chat/completions"):
                assert (await client.post(path, json={"prompt": "x"})).status_code == 401
            assert (await client.get("/v1/models")).status_code == 401

        async with connect(cluster.prefill[0].grpc, interceptors=send_key(SecretStr(BETWEEN_US))) as channel:
            watch = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest())
            assert not (await watch.read()).draining, "a Drain without a key was obeyed"
            watch.cancel()
        async with connect(cluster.grpc_target, interceptors=send_key(SecretStr(CLIENT))) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            result = await collect(stub.Generate(ask(prompt(40), max_tokens=4)))
            assert len(result.outputs[0].token_ids) == 4
            assert result.receipt.handoff_bytes
