"""A model that embeds, through a gateway and prefill workers alone."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from tandem.v1 import inference_pb2, types_pb2, worker_pb2
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from shared.rpc import RpcError, from_grpc
from tests.cluster import Cluster
from tests.e2e.test_serve import up
from tests.tiny_encoders import minilm, tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("The quick brown fox", "a", "Paris is the capital of France.", "def main(): return 0")


@pytest.fixture(scope="module")
async def embedder() -> AsyncIterator[Cluster]:
    async with Cluster(model=str(tiny_encoder()), prefill=1, decode=0, settings={"dtype": "float32"}) as cluster:
        yield cluster


def ask(*texts: str, **fields: Any) -> inference_pb2.EmbedRequest:
    return inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text=text) for text in texts], **fields)


async def embed(cluster: Cluster, request: inference_pb2.EmbedRequest, **options: Any) -> inference_pb2.EmbedResponse:
    return await cluster.stub.Embed(request, timeout=60, **options)


def vectors(reply: inference_pb2.EmbedResponse) -> Tensor:
    return torch.tensor([list(each.values) for each in reply.embeddings])


async def failure(call: Any) -> RpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_grpc(error.value)


@torch.inference_mode()
def reference(folder: Path, *texts: str, normalize: bool = False) -> Tensor:
    """Means of transformers' hidden states."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    means = torch.stack(means)
    return torch.nn.functional.normalize(means) if normalize else means


async def test_vectors_are_transformers_own(embedder: Cluster) -> None:
    reply = await embed(embedder, ask(*TEXTS, request_id="mine"))
    torch.testing.assert_close(vectors(reply), reference(tiny_encoder(), *TEXTS), rtol=1e-4, atol=1e-4)
    assert (reply.request_id, reply.normalized) == ("mine", False)
    tokens = [len(await embedder.token_ids(inference_pb2.GenerateRequest(text=text))) for text in TEXTS]
    assert [each.num_tokens for each in reply.embeddings] == tokens
    assert reply.usage == types_pb2.Usage(prompt_tokens=sum(tokens))
    assert reply.timings.total_s >= reply.timings.prefill_s > 0
    info = await embedder.info(embedder.prefill[0])
    assert reply.receipt.prefill_workers == [info.worker_id]
    assert (reply.receipt.attempts, list(reply.receipt.decode_workers)) == (1, [])
    assert reply.receipt.model_digest == info.layout.model_digest


async def test_bits_are_the_same_alone_and_in_any_batch(embedder: Cluster) -> None:
    together = vectors(await embed(embedder, ask(*TEXTS)))
    alone, beside = await asyncio.gather(
        asyncio.gather(*(embed(embedder, ask(text)) for text in TEXTS)),
        asyncio.gather(*(embed(embedder, ask(*reversed(TEXTS), *TEXTS)) for _ in range(5))),
    )
    assert torch.equal(torch.cat([vectors(reply) for reply in alone]), together)
    for reply in beside:
        assert torch.equal(vectors(reply)[len(TEXTS) :], together)
    ids = [await embedder.token_ids(inference_pb2.GenerateRequest(text=text)) for text in TEXTS]
    inputs = [inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=each)) for each in ids]
    assert torch.equal(vectors(await embed(embedder, inference_pb2.EmbedRequest(inputs=inputs))), together)


async def test_dimensions_and_length(embedder: Cluster) -> None:
    whole = vectors(await embed(embedder, ask(*TEXTS)))
    reply = await embed(embedder, ask(*TEXTS, normalize=True, dimensions=10))
    assert reply.normalized
    torch.testing.assert_close(vectors(reply), torch.nn.functional.normalize(whole[:, :10]))
    assert torch.equal(vectors(await embed(embedder, ask(*TEXTS, dimensions=10))), whole[:, :10])


async def test_what_does_not_fit_is_refused_with_its_length_or_cut_as_asked(embedder: Cluster) -> None:
    long = "fox " * 200
    count = len(AutoTokenizer.from_pretrained(tiny_encoder()).encode(long))
    error = await failure(embed(embedder, ask("a", long)))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs[1].text")
    assert f"has {count} tokens, and the model takes 80" in error.message
    for truncation in (inference_pb2.TRUNCATION_END, inference_pb2.TRUNCATION_START):
        reply = await embed(embedder, ask("a", long, truncation=truncation))
        assert [(each.truncated, each.num_tokens) for each in reply.embeddings][1] == (True, 80)
        assert not reply.embeddings[0].truncated


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(), "inputs"),
        (ask(""), "inputs[0].text"),
        (ask("a", dimensions=65), "dimensions"),
        (ask("a", dimensions=0), "dimensions"),
        (ask("a", request_id="x" * 129), "request_id"),
        (inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput()]), "inputs[0].input"),
        (
            inference_pb2.EmbedRequest(
                inputs=[inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=[5, 384]))]
            ),
            "inputs[0].token_ids.ids[1]",
        ),
    ],
)
async def test_what_is_wrong_is_named(embedder: Cluster, request_: inference_pb2.EmbedRequest, field: str) -> None:
    error = await failure(embed(embedder, request_))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_the_model_says_what_it_does(embedder: Cluster) -> None:
    [model] = (await embedder.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (model.kind, model.dimensions, model.max_context) == (inference_pb2.MODEL_KIND_EMBEDS, 64, 80)
    assert (model.family, model.chat) == ("bert", False)
    info = await embedder.info(embedder.prefill[0])
    assert (info.role, info.embedding_size, info.num_blocks) == (worker_pb2.WORKER_ROLE_PREFILL, 64, 0)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{embedder.http_url}/healthz")).status_code == 200
    generate = embedder.stub.Generate(inference_pb2.GenerateRequest(text="a"))
    error = await failure(generate.read())
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "call Embed" in error.message
    assert (await failure(embed(embedder, ask("a", model="another")))).code == grpc.StatusCode.NOT_FOUND


async def test_the_openai_package(embedder: Cluster) -> None:
    expected = vectors(await embed(embedder, ask(*TEXTS)))
    async with openai.AsyncOpenAI(base_url=f"{embedder.http_url}/v1", api_key="none", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        reply = await client.embeddings.create(model=name, input=list(TEXTS))  # base64 underneath
        plain = await client.embeddings.create(model=name, input=list(TEXTS), encoding_format="float")
        assert [each.embedding for each in reply.data] == [each.embedding for each in plain.data]
        assert torch.equal(torch.tensor([each.embedding for each in reply.data]), expected)
        assert [each.index for each in reply.data] == [0, 1, 2, 3]
        assert reply.usage.prompt_tokens == reply.usage.total_tokens > 4
        ids = await embedder.token_ids(inference_pb2.GenerateRequest(text=TEXTS[0]))
        for given in (ids, [ids]):
            reply = await client.embeddings.create(model=name, input=given, dimensions=5)
            assert torch.equal(torch.tensor(reply.data[0].embedding), expected[0, :5])
        with pytest.raises(openai.BadRequestError, match=r"input\[0\]"):
            await client.embeddings.create(model=name, input=["fox " * 200])
        reply = await client.embeddings.create(model=name, input="fox " * 200, extra_body={"truncation": "end"})
        assert len(reply.data[0].embedding) == 64
        with pytest.raises(openai.APIStatusError, match="call Embed"):
            await client.completions.create(model=name, prompt="a")


async def test_a_client_that_leaves_or_is_late_holds_nothing(embedder: Cluster) -> None:
    before = await embedder.resources()
    request = ask(*(TEXTS * 200))
    call = embedder.stub.Embed(request)
    await embedder.until(embedder.prefill[0], lambda load: load.queued_tokens)
    call.cancel()
    error = await failure(embedder.stub.Embed(request, timeout=0.05))
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await embedder.settled()
    await embedder.back_to(before)


async def test_a_request_outlives_its_worker() -> None:
    async with Cluster(model=str(tiny_encoder()), prefill=2, decode=0, settings={"dtype": "float32"}) as cluster:
        request = ask(*(TEXTS * 300))
        expected = vectors(await embed(cluster, request))
        call = asyncio.create_task(embed(cluster, request))
        worker = await cluster.until(cluster.prefill, lambda load: load.queued_tokens)
        lost = await cluster.info(worker)
        await worker.kill()
        reply = await call
        assert torch.equal(vectors(reply), expected)
        assert reply.receipt.attempts == 2
        assert lost.worker_id not in reply.receipt.prefill_workers
        text = await cluster.metrics_text()
        assert 'method="Embed"' in text
        await cluster.settled()


@pytest.mark.slow
async def test_minilm_equals_transformers_through_the_service() -> None:
    folder = minilm().folder
    texts = [*TEXTS, "How many people live in Berlin?", "Berlin has 3.7 million inhabitants. " * 20]
    async with Cluster(model="all-minilm-l6-v2", decode=0, settings={"dtype": "float32"}) as cluster:
        reply = await embed(cluster, ask(*texts))
        assert reply.normalized
        expected = reference(folder, *texts, normalize=True)
        torch.testing.assert_close(vectors(reply), expected, rtol=0, atol=1e-5)
        error = await failure(embed(cluster, ask("word " * 300)))
        assert "has 302 tokens, and the model takes 256" in error.message


def test_a_decode_worker_refuses_such_a_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "decode_worker", "--set", f"model={tiny_encoder()}", "--set", "decode.port=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "prefill workers do alone" in done.stderr


@pytest.mark.slow
async def test_tandem_up_starts_no_decode_worker() -> None:
    minilm()
    async with up("all-minilm-l6-v2") as service:
        assert len(service.children) == 2
        assert "tandem generate" not in service.ready_text
        [command] = re.findall(r"^  (curl .*)$", service.ready_text, re.MULTILINE)
        status, output, errors = await service.run(*shlex.split(command), "-sS")
        assert status == 0, errors
        reply = json.loads(output)
        assert len(reply["data"][0]["embedding"]) == 384
        assert reply["model"] == "all-minilm-l6-v2"
        service.process.send_signal(signal.SIGINT)
        assert await service.ended() == 0
