"""Embed over scripted workers: what they get, their failures, keys, budgets, and the end of the gateway."""

from __future__ import annotations

import asyncio
import base64
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from pydantic import SecretStr
from tandem.v1 import inference_pb2, prefill_pb2, worker_pb2
from tokenizers.processors import TemplateProcessing

from gateway.budget import Budget
from gateway.embedding_job import resolve_embedding
from gateway.openai_embedding import EmbeddingRequest, in_base64
from gateway.openai_error import OpenAIError
from gateway.resolution import Limits
from shared.config import ApiKey
from shared.rpc import RpcError, exhausted, from_grpc, internal, unavailable
from shared.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.scripted_scene import Scene, model, scene_of
from tests.scripted_scene import request as generate
from tests.scripted_workers import TOKENIZER, ScriptedPrefill

SIZE = 8
KEYS = (
    ApiKey(name="alice", key=SecretStr("alice-secret"), max_running=1),
    ApiKey(name="bob", key=SecretStr("bob-secret"), models=("another",)),
)


def embeds(scene: Scene) -> None:
    for worker in scene.prefills:
        worker.info = {"embedding_size": SIZE, "normalizes": True, "num_blocks": 0, "max_context": 10}


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with scene_of(prefill=2, embeds=True, prepare=embeds, recovery_wait_s=5) as scene:
        yield scene
        await scene.idle()


def ask(*texts: str, **fields: Any) -> inference_pb2.EmbedRequest:
    return inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text=text) for text in texts], **fields)


async def failure(call: Any) -> RpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_grpc(error.value)


async def hang(worker: ScriptedPrefill, request: prefill_pb2.EmbedTokensRequest) -> Any:
    await asyncio.Event().wait()


def fails_with(error: RpcError) -> Any:
    async def script(worker: ScriptedPrefill, request: prefill_pb2.EmbedTokensRequest) -> Any:
        raise error

    return script


async def test_a_worker_gets_tokens_and_every_choice(scene: Scene) -> None:
    reply = await scene.stub.Embed(ask("hello", "hi there", priority=3, dimensions=4, request_id="r1"))
    [request] = scene.prefills[0].embed_requests + scene.prefills[1].embed_requests
    texts = [TOKENIZER.encode("hello"), TOKENIZER.encode("hi there")]
    assert [list(sequence.token_ids) for sequence in request.sequences] == texts
    assert (request.request_id, request.attempt, request.model) == ("r1", 1, "scripted")
    assert (request.normalize, request.dimensions, request.priority) == (True, 4, 3)
    assert [list(each.values) for each in reply.embeddings] == [[sum(text)] * 4 for text in texts]
    assert (reply.normalized, reply.usage.prompt_tokens) == (True, sum(map(len, texts)))
    text = scene.metrics.render().decode()
    assert 'tandem_requests_total{code="OK",method="Embed",model="scripted"} 1.0' in text
    assert "tandem_time_to_first_token_seconds_count 0.0" in text
    await scene.stub.Embed(ask("hello", normalize=False))
    assert {request.normalize for worker in scene.prefills for request in worker.embed_requests} == {True, False}


async def test_a_worker_that_fails_is_followed_by_another(scene: Scene) -> None:
    for worker in scene.prefills:
        worker.embed_script = fails_with(unavailable("gone"))
    error = await failure(scene.stub.Embed(ask("hello")))
    assert error.code == grpc.StatusCode.UNAVAILABLE
    assert "4 times without success, at last: gone" in error.message
    tried = [request.attempt for worker in scene.prefills for request in worker.embed_requests]
    assert sorted(tried) == [1, 2, 3, 4]
    for worker in scene.prefills:
        worker.embed_script = fails_with(exhausted("full"))
    error = await failure(scene.stub.Embed(ask("hello")))
    assert (error.code, error.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


async def test_what_is_no_fault_of_a_worker_is_the_clients_answer(scene: Scene) -> None:
    for worker in scene.prefills:
        worker.embed_script = fails_with(internal(RuntimeError("a bug")))
    error = await failure(scene.stub.Embed(ask("hello")))
    assert error.code == grpc.StatusCode.INTERNAL
    assert sum(len(worker.embed_requests) for worker in scene.prefills) == 1


async def test_other_vectors_than_asked_for_are_not_passed_on(scene: Scene) -> None:
    async def short(worker: ScriptedPrefill, request: prefill_pb2.EmbedTokensRequest) -> Any:
        reply = await worker.embed(request)
        del reply.vectors[-1].values[-1]
        return reply

    scene.prefills[0].embed_script = scene.prefills[1].embed_script = short
    error = await failure(scene.stub.Embed(ask("hello")))
    assert error.code == grpc.StatusCode.UNAVAILABLE


async def test_nobody_is_there(scene: Scene) -> None:
    assert scene.gateway.serving
    for worker in scene.prefills:
        await worker.kill()
        await scene.gone(worker)
    assert not scene.gateway.serving
    error = await failure(scene.stub.Embed(ask("hello")))
    assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "no prefill worker is alive")


async def test_a_cancelled_or_late_call_ends_on_the_worker(scene: Scene) -> None:
    for worker in scene.prefills:
        worker.embed_script = hang
    call = scene.stub.Embed(ask("hello"))
    await asyncio.wait(
        [asyncio.create_task(worker.until(lambda w=worker: w.open_streams == 1)) for worker in scene.prefills],
        return_when=asyncio.FIRST_COMPLETED,
    )
    call.cancel()
    await scene.idle()
    error = await failure(scene.stub.Embed(ask("hello"), timeout=0.2))
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await scene.idle()


async def test_keys_and_quotas() -> None:
    async with scene_of(embeds=True, prepare=embeds, auth={"api_keys": KEYS}) as scene:
        alice, bob = ((("authorization", f"Bearer {name}-secret"),) for name in ("alice", "bob"))
        assert (await failure(scene.stub.Embed(ask("a")))).code == grpc.StatusCode.UNAUTHENTICATED
        assert (await failure(scene.stub.Embed(ask("a"), metadata=bob))).code == grpc.StatusCode.PERMISSION_DENIED
        scene.prefill.embed_script = hang
        first = scene.stub.Embed(ask("a"), metadata=alice)
        await scene.prefill.until(lambda: scene.prefill.open_streams == 1)
        error = await failure(scene.stub.Embed(ask("a"), metadata=alice))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await scene.idle()


async def test_a_gateway_that_stops_refuses_and_ends_the_others() -> None:
    async with scene_of(embeds=True, prepare=embeds) as scene:
        scene.prefill.embed_script = hang
        call = asyncio.ensure_future(scene.stub.Embed(ask("a")))
        await scene.prefill.until(lambda: scene.prefill.open_streams == 1)
        await scene.gateway.drain(0.01)
        error = await failure(scene.stub.Embed(ask("a")))
        assert error.code == grpc.StatusCode.UNAVAILABLE
        await scene.gateway.cancel()
        error = await failure(call)
        assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "the gateway is shutting down")
        await scene.idle()


async def test_each_kind_of_model_names_what_it_does(scene: Scene) -> None:
    error = await failure(scene.stub.Generate(generate()).read())
    assert (error.code, "call Embed" in error.message) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    async with scene_of() as generating:
        error = await failure(generating.stub.Embed(ask("a")))
        assert (error.code, "call Generate" in error.message) == (grpc.StatusCode.FAILED_PRECONDITION, True)


@pytest.mark.parametrize("truncation", [inference_pb2.TRUNCATION_END, inference_pb2.TRUNCATION_START])
async def test_truncation_keeps_what_frames_a_text(truncation: inference_pb2.Truncation.ValueType) -> None:
    backend = tiny_tokenizers.byte_level()
    first, last = (str(backend.id_to_token(i)) for i in range(2))
    backend.post_processor = TemplateProcessing(
        single=[first, "$A", last],
        special_tokens=[(first, 0), (last, 1)],  # pyright: ignore[reportArgumentType]
    )
    tokenizer = Tokenizer(backend)
    text = "a text of many tokens, each of a byte or two"
    framed = tokenizer.encode(text)
    assert (framed[0], framed[-1]) == (0, 1)
    job = await resolve_embedding(
        ask(text, truncation=truncation),
        replace(model(embeds=True), tokenizer=tokenizer),
        Limits(max_context=10, vocab_size=400),
        worker_pb2.GetInfoResponse(embedding_size=SIZE),
        Budget.of(1),
        1 << 20,
    )
    kept = framed[1:9] if truncation == inference_pb2.TRUNCATION_END else framed[-9:-1]
    assert list(job.inputs[0].token_ids) == [0, *kept, 1]
    assert job.inputs[0].truncated


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"input": []}', "input"),
        (b'{"input": [1, "a"]}', "input"),
        (b'{"input": [[1, -1]]}', "input"),
        (b'{"input": "a", "encoding_format": "int8"}', "encoding_format"),
        (b'{"input": "a", "dimensions": -1}', "dimensions"),
        (b'{"model": "x"}', "input"),
        (b'{"input": "a", "colour": 1}', "colour"),
    ],
)
def test_a_body_of_openai_that_is_wrong_is_named(body: bytes, param: str) -> None:
    with pytest.raises(OpenAIError) as error:
        EmbeddingRequest.parse(body)
    assert (error.value.status, error.value.param) == (400, param)


def test_base64_is_little_endian_float32() -> None:
    assert base64.b64decode(in_base64([1.0, -2.5])) == array("f", [1.0, -2.5]).tobytes() == b"\0\0\x80?\0\0 \xc0"
