"""The official `openai` package against the running service: the same tokens as over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tandem.v1 import inference_pb2, types_pb2

from tests.cluster import Cluster

PROMPT = "The capital of France is"
QUESTION: list[Any] = [{"role": "user", "content": "What is gravity?"}]


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def model(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


async def test_streamed_chat_is_what_grpc_gives(client: openai.AsyncOpenAI, cluster: Cluster, model: str) -> None:
    turns = [inference_pb2.ChatMessage(role="user", content="What is gravity?")]
    expected = await cluster.generate(
        inference_pb2.GenerateRequest(
            messages=inference_pb2.ChatMessages(messages=turns),
            sampling=types_pb2.SamplingParams(max_tokens=32, temperature=0),
        )
    )
    stream = await client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.outputs[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 1
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (expected.usage.prompt_tokens, 32)
    assert last.model_extra is not None
    assert last.model_extra["tandem"][0]["receipt"]["attempts"] == 1


async def test_seeded_completions_with_logprobs(client: openai.AsyncOpenAI, cluster: Cluster, model: str) -> None:
    sampling = types_pb2.SamplingParams(max_tokens=16, temperature=1, seed=11, n=2, logprobs=3)
    expected = await cluster.generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling))
    ids = await cluster.token_ids(inference_pb2.GenerateRequest(text=PROMPT))
    for prompt in (PROMPT, ids):
        reply = await client.completions.create(model=model, prompt=prompt, temperature=1, seed=11, n=2, logprobs=3)
        assert [choice.text for choice in reply.choices] == [expected.outputs[i].text for i in range(2)]
        for i, choice in enumerate(reply.choices):
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs == [one.chosen.logprob for one in expected.outputs[i].logprobs]
            assert choice.logprobs.tokens == [one.chosen.text for one in expected.outputs[i].logprobs]


async def test_several_prompts_echoed(client: openai.AsyncOpenAI, model: str) -> None:
    prompts = ["One, two,", "Red, green,"]
    together = await client.completions.create(model=model, prompt=prompts, temperature=0, echo=True)
    alone = [await client.completions.create(model=model, prompt=prompt, temperature=0) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [
        prompt + reply.choices[0].text for prompt, reply in zip(prompts, alone, strict=True)
    ]


async def test_a_stop_string_ends_the_text(client: openai.AsyncOpenAI, model: str) -> None:
    free = await client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=24)
    stop = free.choices[0].text[8:12]
    reply = await client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=24, stop=stop)
    assert reply.choices[0].text == free.choices[0].text.split(stop)[0]
    assert reply.choices[0].finish_reason == "stop"


async def test_refusals_name_the_parameter(client: openai.AsyncOpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=model, messages=QUESTION, top_p=3)
    assert caught.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=model, prompt=[1, 10**6])
    assert caught.value.param == "prompt[1]"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-0", messages=QUESTION)
    assert missing.value.code == "model_not_found"


async def test_a_client_that_leaves_frees_its_blocks(client: openai.AsyncOpenAI, cluster: Cluster, model: str) -> None:
    stream = await client.completions.create(model=model, prompt="Once", max_tokens=1900, stream=True)
    await anext(stream)
    await stream.close()
    async with asyncio.timeout(10):  # all 1900 tokens would take longer
        await cluster.settled()


async def test_health_and_metrics_tell_what_was_served(
    client: openai.AsyncOpenAI, cluster: Cluster, model: str
) -> None:
    await client.completions.create(model=model, prompt="A prompt that no other test sends: 8613.")
    async with asyncio.timeout(10), httpx.AsyncClient(base_url=cluster.http_url) as http:
        assert (await http.get("/healthz")).json() == {"status": "serving"}
        found = await scrape(http)
        while found.get(("tandem_requests_total", "OK"), 0) < 1:  # the answer may be here before its count
            found = await scrape(http)
    assert found["tandem_worker_up", "prefill"] == found["tandem_worker_up", "decode"] == 1
    assert found["tandem_handoff_bytes_total", "shared_memory"] > 0
    assert found["tandem_time_to_first_token_seconds_count", None] >= 1
    assert found["tandem_inter_token_seconds_count", None] >= 1


async def scrape(http: httpx.AsyncClient) -> dict[tuple[str, str | None], float]:
    """Name, and role, transport or code, to value."""
    found = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            label = next((sample.labels[key] for key in ("role", "transport", "code") if key in sample.labels), None)
            found[sample.name, label] = sample.value
    return found
