"""The HTTP port over real sockets: what the official `openai` package makes of the answers.

The gateway behind it is a script of replies, so that each translation, failure and pause can be had at will; the same
port before real workers is in test_openai_client.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import httpx
import openai
import pytest
import uvicorn
from pydantic import SecretStr
from tandem.v1 import inference_pb2, types_pb2

from gateway.http import create_app
from gateway.merged_stream import MergedStream
from gateway.metrics import Metrics
from gateway.openai_answer import Answer
from gateway.openai_reply import CompletionFormat, Envelope
from shared import rpc
from shared.auth import Access
from shared.config import ApiKey

Reply = inference_pb2.GenerateResponse
MAX_BODY_BYTES = 10_000
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
KEYS = (
    ApiKey(name="alice", key=SecretStr("alice-secret")),
    ApiKey(name="bob", key=SecretStr("bob-secret"), models=("other",)),
    ApiKey(name="carol", key=SecretStr("carol-secret"), max_running=1),
)


class ScriptedGateway:
    """Answers every request with `script`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.serving = True
        self.script: Callable[[inference_pb2.GenerateRequest], AsyncIterator[Reply]] = words
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.budgets: list[float | None] = []
        self.started, self.closed = asyncio.Event(), asyncio.Event()

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, budget_s: float | None, resumable: bool
    ) -> AsyncGenerator[Reply, None]:
        assert not resumable
        self.requests.append(request)
        self.budgets.append(budget_s)
        self.started.set()
        try:
            async for reply in self.script(request):
                yield reply
        finally:
            self.closed.set()

    def models(self) -> Sequence[inference_pb2.Model]:
        return [
            inference_pb2.Model(name="small", family="llama", max_context=2048, digest="0123456789abcdef99", chat=True),
            inference_pb2.Model(name="org/other", max_context=512),
        ]

    def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text="".join(f"<{token}>" for token in request.token_ids))


def token(index: int, position: int, text: str, *, finish: types_pb2.FinishReason.ValueType | None = None) -> Reply:
    output = inference_pb2.Output(index=index, position=position, token_ids=[position], text=text)
    if finish is not None:
        output.finish_reason = finish
    return Reply(outputs=[output])


async def words(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
    """Each output says the prompt, its number and "!", three tokens; the second begins with a held-back piece."""
    said = request.text or "chat"
    yield Reply(request_id="r1", resolved_sampling=types_pb2.SamplingParams(seed=2**63, logit_bias={5: 1.5}))
    for index in range(request.sampling.n or 1):
        yield token(index, 0, said)
        yield token(index, 1, "")
        yield token(index, 2, f" {index}!", finish=types_pb2.FINISH_REASON_STOP)
    yield Reply(
        usage=types_pb2.Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=3),
        timings=types_pb2.Timings(first_token_s=0.25),
        receipt=types_pb2.Receipt(transport=types_pb2.TRANSPORT_SHARED_MEMORY, handoff_bytes=2**40, attempts=1),
    )


def failing(error: Exception, *, after: int = 0) -> Callable[[inference_pb2.GenerateRequest], AsyncIterator[Reply]]:
    async def script(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
        for position in range(after):
            yield token(0, position, "word ")
        raise error

    return script


async def endless(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
    yield token(0, 0, "first")
    await asyncio.Event().wait()


async def silent(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
    await asyncio.Event().wait()
    yield Reply()


class Port:
    """An application on a real port."""

    def __init__(self, access: Access) -> None:
        self.gateway = ScriptedGateway()
        app = create_app(self.gateway, access, max_body_bytes=MAX_BODY_BYTES)
        self.server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_level="error", timeout_graceful_shutdown=2)
        )
        # connections wait in its backlog until the server is up
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    async def run(self) -> AsyncIterator[Port]:
        serving = asyncio.create_task(self.server.serve(sockets=[self.socket]))
        yield self
        self.server.should_exit = True
        await serving


@pytest.fixture(scope="module")
async def open_port() -> AsyncIterator[Port]:
    async for port in Port(Access(())).run():
        yield port


@pytest.fixture(scope="module")
async def locked_port() -> AsyncIterator[Port]:
    async for port in Port(Access(KEYS)).run():
        yield port


@pytest.fixture
def port(open_port: Port) -> Port:
    reset(open_port.gateway)
    return open_port


def reset(gateway: ScriptedGateway) -> None:
    gateway.script, gateway.serving = words, True
    gateway.requests.clear()
    gateway.budgets.clear()
    gateway.started.clear()
    gateway.closed.clear()


@pytest.fixture
async def client(port: Port) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{port.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
async def http(port: Port) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=port.url, timeout=10) as client:
        yield client


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["small", "org/other"]
    assert (await client.models.retrieve("org/other")).owned_by == "tandem"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("missing")
    assert caught.value.code == "model_not_found"


async def test_completion(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="small", prompt="say")
    assert reply.object == "text_completion"
    assert reply.id == "cmpl-r1"
    assert reply._request_id == "cmpl-r1"
    assert reply.model == "small"
    assert reply.system_fingerprint == "fp_0123456789abcdef"
    [choice] = reply.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "say 0!", "stop", None)
    assert reply.usage is not None
    assert reply.usage.total_tokens == 7
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2


async def test_each_answer_says_how_it_was_served(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="small", prompt=["a", "b"])
    assert reply.model_extra is not None
    for report in reply.model_extra["tandem"]:
        assert report["request_id"] == "r1"
        # 64-bit numbers stay numbers
        assert report["sampling"] == {"seed": 2**63, "logit_bias": {"5": 1.5}}
        assert report["receipt"] == {"transport": "shared_memory", "handoff_bytes": 2**40, "attempts": 1}
        assert report["timings"]["first_token_s"] == 0.25


async def test_model_is_optional(http: httpx.AsyncClient, port: Port) -> None:
    reply = await http.post("/v1/completions", json={"prompt": "say"})
    assert reply.json()["model"] == "small"
    assert port.gateway.requests[0].model == ""


async def test_prompts_and_outputs_in_openai_order(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="small", prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in reply.choices] == [
        (0, "a 0!"),
        (1, "a 1!"),
        (2, "b 0!"),
        (3, "b 1!"),
    ]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 8


async def test_streamed_completion(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="small", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [""] * 4
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        assert chunk.usage is None
    assert texts == ["a 0!", "a 1!", "b 0!", "b 1!"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].model_extra is not None
    assert len(chunks[-1].model_extra["tandem"]) == 2
    assert {chunk.id for chunk in chunks} == {"cmpl-r1"}


async def test_chat(client: openai.AsyncOpenAI, port: Port) -> None:
    reply = await client.chat.completions.create(model="small", messages=HELLO)
    assert reply.object == "chat.completion"
    assert reply.id == "chatcmpl-r1"
    message = reply.choices[0].message
    assert (message.role, message.content, reply.choices[0].finish_reason) == ("assistant", "chat 0!", "stop")
    # what was answered can be sent back
    await client.chat.completions.create(model="small", messages=[*HELLO, message, *HELLO])
    assert [turn.content for turn in port.gateway.requests[1].messages.messages] == ["hello", "chat 0!", "hello"]


async def test_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["chat", " 0!"]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


async def test_an_output_that_ends_with_nothing_to_say_still_has_its_end(
    client: openai.AsyncOpenAI, port: Port
) -> None:
    async def script(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
        yield token(0, 0, "", finish=types_pb2.FINISH_REASON_LENGTH)

    port.gateway.script = script
    stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
    [chunk] = [chunk async for chunk in stream]
    assert chunk.choices[0].delta.content == ""
    assert chunk.choices[0].finish_reason == "length"


async def with_logprobs(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
    def of(token_id: int, text: str, logprob: float) -> types_pb2.TokenLogprob:
        return types_pb2.TokenLogprob(token_id=token_id, text=text, logprob=logprob)

    chosen = [of(1, "né", -0.5), of(2, "\ufffd", float("-inf"))]
    for position, one in enumerate(chosen):
        reply = token(0, position, one.text)
        top = [of(3, "x", -0.25), one]
        reply.outputs[0].logprobs.append(types_pb2.PositionLogprobs(chosen=one, top=top))
        yield reply


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(client: openai.AsyncOpenAI, port: Port, stream: bool) -> None:
    port.gateway.script = with_logprobs
    found: list[Any] = []
    reply: Any = await client.completions.create(model="small", prompt="p", logprobs=1, stream=stream)
    for part in [chunk async for chunk in reply] if stream else [reply]:
        logprobs = part.choices[0].logprobs
        found += zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, logprobs.top_logprobs, strict=True)
    assert found == [
        ("né", -0.5, 0, {"x": -0.25, "né": -0.5}),
        ("\ufffd", -9999.0, 2, {"x": -0.25, "\ufffd": -9999.0}),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client: openai.AsyncOpenAI, port: Port, stream: bool) -> None:
    port.gateway.script = with_logprobs
    reply: Any = await client.chat.completions.create(
        model="small", messages=HELLO, logprobs=True, top_logprobs=2, stream=stream
    )
    parts = [chunk async for chunk in reply] if stream else [reply]
    first, second = [token for part in parts for token in part.choices[0].logprobs.content]
    assert (first.token, first.logprob, first.bytes) == ("né", -0.5, [110, 195, 169])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("x", -0.25), ("né", -0.5)]
    assert (second.logprob, second.bytes) == (-9999.0, None)


@pytest.mark.parametrize(("prompt", "expected"), [("say", "saysay 0!"), ([7, 8], "<7><8>chat 0!")])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: openai.AsyncOpenAI, prompt: Any, expected: str, stream: bool) -> None:
    reply: Any = await client.completions.create(model="small", prompt=prompt, echo=True, stream=stream)
    parts = [chunk async for chunk in reply] if stream else [reply]
    assert "".join(part.choices[0].text for part in parts) == expected


async def test_deadline_becomes_the_budget(client: openai.AsyncOpenAI, port: Port) -> None:
    await client.completions.create(model="small", prompt="p", extra_body={"deadline_s": 2.5})
    assert port.gateway.budgets == [2.5]


@pytest.mark.parametrize(
    ("error", "kind", "status", "code", "retry"),
    [
        (rpc.invalid("sampling.top_p", "is 3"), openai.BadRequestError, 400, "invalid_value", "false"),
        (rpc.not_found("model", "x", "no such model"), openai.NotFoundError, 404, "model_not_found", "false"),
        (rpc.stale("an old epoch"), openai.ConflictError, 409, "aborted", "true"),
        (rpc.mismatch("digest", "differs"), openai.APIStatusError, 412, "failed_precondition", "false"),
        (rpc.exhausted("full", 0.25), openai.RateLimitError, 429, "rate_limit_exceeded", "true"),
        (rpc.unavailable("draining", 2.5), openai.InternalServerError, 503, "unavailable", "true"),
        (rpc.deadline("too late"), openai.InternalServerError, 504, "deadline_exceeded", "true"),
        (RuntimeError("a secret"), openai.InternalServerError, 500, "internal", "false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_error_table(
    client: openai.AsyncOpenAI,
    port: Port,
    stream: bool,
    error: Exception,
    kind: type[openai.APIStatusError],
    status: int,
    code: str,
    retry: str,
) -> None:
    port.gateway.script = failing(error)
    with pytest.raises(kind) as caught:
        await client.completions.create(model="small", prompt="p", stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers["x-should-retry"] == retry
    assert "secret" not in caught.value.message
    if isinstance(error, rpc.RpcError) and error.retry_after_s:
        assert caught.value.response.headers["retry-after"] in ("1", "3")
        assert int(caught.value.response.headers["retry-after-ms"]) == error.retry_after_s * 1000


async def test_errors_name_the_parameter_as_the_client_wrote_it(client: openai.AsyncOpenAI, port: Port) -> None:
    port.gateway.script = failing(
        rpc.invalid("sampling.logprobs", "too many", ("messages.messages[1].role", "empty"), ("prompt", "too long"))
    )
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="small", messages=HELLO)
    assert caught.value.param == "top_logprobs"
    assert caught.value.body == {
        "message": "top_logprobs: too many; messages[1].role: empty; messages: too long",
        "type": "invalid_request_error",
        "param": "top_logprobs",
        "code": "invalid_value",
    }


@pytest.mark.parametrize("field", ["text", "token_ids", "token_ids.ids", "prompt"])
async def test_a_prompt_is_called_prompt(client: openai.AsyncOpenAI, port: Port, field: str) -> None:
    port.gateway.script = failing(rpc.invalid(f"{field}[3]", "outside the vocabulary"))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="small", prompt=[1, 2, 3, 4])
    assert caught.value.param == "prompt[3]"


async def test_one_of_several_prompts_fails(client: openai.AsyncOpenAI, port: Port) -> None:
    async def script(request: inference_pb2.GenerateRequest) -> AsyncIterator[Reply]:
        if request.text == "bad":
            raise rpc.exhausted("full")
        async for reply in endless(request):
            yield reply

    port.gateway.script = script
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="small", prompt=["good", "bad"])
    await port.gateway.closed.wait()


async def test_a_failure_in_mid_stream_cannot_pass_for_the_end(client: openai.AsyncOpenAI, port: Port) -> None:
    port.gateway.script = failing(rpc.unavailable("the last worker died"), after=3)
    stream = await client.chat.completions.create(model="small", messages=HELLO, stream=True)
    texts = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
    assert texts == ["word "] * 3
    with pytest.raises(openai.APIError, match="the last worker died") as caught:
        await anext(stream)
    assert caught.value.code == "unavailable"


async def test_no_done_after_a_failure(http: httpx.AsyncClient, port: Port) -> None:
    port.gateway.script = failing(RuntimeError("a bug"), after=1)
    body = {"prompt": "p", "stream": True}
    lines = (await http.post("/v1/completions", json=body)).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "internal"
    assert lines[-1] == ""
    port.gateway.script = words
    assert (await http.post("/v1/completions", json=body)).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("script", [endless, silent])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(
    http: httpx.AsyncClient, port: Port, script: Any, stream: bool
) -> None:
    port.gateway.script = script
    call = asyncio.create_task(http.post("/v1/completions", json={"prompt": "p", "stream": stream}))
    await port.gateway.started.wait()
    call.cancel()
    await asyncio.wait({call})
    async with asyncio.timeout(5):
        await port.gateway.closed.wait()


async def test_what_is_ready_goes_out_in_one_piece() -> None:
    async def burst(count: int) -> AsyncGenerator[Reply, None]:
        for position in range(count):
            yield token(0, position, f"{position} ")

    answer = Answer(CompletionFormat(), Envelope("id", "small", ""), 1, [""])
    async with MergedStream([burst(50)]) as merged:
        pieces = [piece async for piece in answer.events(await merged.ready(), merged, False)]
    assert len(pieces) == 2
    assert pieces[0].count(b"data: ") == 50
    assert pieces[1] == b"data: [DONE]\n\n"


async def test_a_merged_stream_reads_no_further_ahead_than_its_bound() -> None:
    read = 0

    async def long() -> AsyncGenerator[Reply, None]:
        nonlocal read
        for read in range(10_000):  # noqa: B007
            yield Reply()

    async with MergedStream([long()]) as merged:
        assert len(await merged.ready()) < 1000
        assert read < 1000


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b'{"prompt": "%b"}' % (b"x" * MAX_BODY_BYTES), 413),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/embeddings", b"{}", 400),
        ("POST", "/v1/images/generations", b"{}", 404),
    ],
)
async def test_requests_that_never_reach_the_gateway(
    http: httpx.AsyncClient, port: Port, method: str, path: str, body: bytes, status: int
) -> None:
    reply = await http.request(method, path, content=body)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert port.gateway.requests == []


async def test_a_body_of_unknown_length_is_bounded_too(http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * (MAX_BODY_BYTES // 50)

    assert (await http.post("/v1/completions", content=body())).status_code == 413


async def test_health_and_metrics_and_page(http: httpx.AsyncClient, port: Port) -> None:
    assert (await http.get("/healthz")).status_code == 200
    port.gateway.serving = False
    assert (await http.get("/healthz")).status_code == 503
    await http.post("/v1/completions", json={"prompt": "p"})
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'tandem_http_requests_total{route="/v1/completions",status="200"}' in metrics.text
    page = await http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>Tandem</title>" in page.text


async def test_keys(locked_port: Port) -> None:
    gateway = locked_port.gateway
    reset(gateway)

    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{locked_port.url}/v1", api_key=key, max_retries=0, timeout=10)

    async with (
        client("nobody") as nobody,
        client("alice-secret") as alice,
        client("bob-secret") as bob,
        client("carol-secret") as carol,
    ):
        with pytest.raises(openai.AuthenticationError) as unknown:
            await nobody.models.list()
        assert unknown.value.response.headers["www-authenticate"] == "Bearer"
        assert (await alice.completions.create(model="small", prompt="p")).choices
        with pytest.raises(openai.PermissionDeniedError):
            await bob.completions.create(model="small", prompt="p")

        gateway.script = endless
        async with await carol.completions.create(model="small", prompt="p", stream=True) as held:
            await anext(held)
            with pytest.raises(openai.RateLimitError, match="quota"):
                await carol.completions.create(model="small", prompt="p")
            gateway.closed.clear()
        async with asyncio.timeout(5):
            await gateway.closed.wait()
        gateway.script = words
        assert (await carol.completions.create(model="small", prompt="p")).choices
    async with httpx.AsyncClient(base_url=locked_port.url) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401


async def test_a_status_of_a_worker_is_passed_on(client: openai.AsyncOpenAI, port: Port) -> None:
    """What a worker's stub raises keeps its code and details."""
    raised = rpc.exhausted("no free block", 0.5)
    trailers = grpc.aio.Metadata(*rpc.to_trailers(raised))
    port.gateway.script = failing(
        grpc.aio.AioRpcError(raised.code, grpc.aio.Metadata(), trailers, raised.message, None)
    )
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="small", prompt="p")
    assert caught.value.response.headers["retry-after-ms"] == "500"
