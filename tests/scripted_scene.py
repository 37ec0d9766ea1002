"""A gateway over scripted workers, and a client of it, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2, worker_pb2

from gateway.changes import Changes
from gateway.discovery import Resolve, resolve
from gateway.gateway import Gateway
from gateway.metrics import Metrics
from gateway.model import SamplingDefaults, ServedModel
from gateway.service import SERVICE_NAME, InferenceService
from shared.auth import Access
from shared.chat_template import ChatTemplate
from shared.config import TandemConfig
from shared.rpc import Health, connect, create_server
from tests.scripted_workers import TOKENIZER, ScriptedDecode, ScriptedPrefill, ScriptedWorker

TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}
{%- if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"""


def model(digest: str = "d1", *, embeds: bool = False) -> ServedModel:
    template, defaults = ChatTemplate(TEMPLATE, {}), SamplingDefaults(temperature=0.5)
    return ServedModel("scripted", digest, TOKENIZER, template, defaults, embeds)


class WatchedMetrics(Metrics):
    """Metrics that tell when a load report has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = Changes()

    def set_worker_load(self, worker_id: str, role: str, load: worker_pb2.WatchLoadResponse) -> None:
        super().set_worker_load(worker_id, role, load)
        self.reports.announce()


@dataclass
class Scene:
    """A gateway and its workers, and a client of it."""

    prefills: list[ScriptedPrefill]
    decodes: list[ScriptedDecode]
    gateway: Gateway
    stub: inference_pb2_grpc.InferenceServiceAsyncStub
    channel: grpc.aio.Channel
    metrics: WatchedMetrics

    @property
    def prefill(self) -> ScriptedPrefill:
        return self.prefills[0]

    @property
    def decode(self) -> ScriptedDecode:
        return self.decodes[0]

    async def idle(self) -> None:
        """No stream of any request is open anywhere, and the gateway has no task left."""
        for worker in (*self.prefills, *self.decodes):
            await worker.idle()
        while self.gateway.num_requests:
            await asyncio.wait({*self.gateway._tasks, *self.gateway._embeddings})

    async def alive(self, *workers: ScriptedWorker) -> None:
        """The gateway knows the workers as they are now."""
        wanted = {worker.worker_id for worker in workers}
        while not wanted <= {worker.worker_id for worker in self.gateway.workers._all if worker.alive}:
            await self.gateway.workers.changes.next()

    async def reported(self, worker: ScriptedWorker, **load: Any) -> None:
        """Tells a load, and waits until it has reached the gateway."""
        worker.report(**load)
        known = next(known for known in self.gateway.workers._all if known.target == worker.target)
        while known.load != worker.load:
            await self.metrics.reports.next()

    async def gone(self, worker: ScriptedWorker) -> None:
        """The gateway knows that nobody is at the worker's address."""
        while any(known.alive for known in self.gateway.workers._all if known.target == worker.target):
            await self.gateway.workers.changes.next()

    async def collect(self, request: inference_pb2.GenerateRequest, **options: Any) -> Collected:
        """Generate to the end, checking that every position comes exactly once."""
        collected = Collected()
        async with aclosing(self.gateway.generate(request, **options)) as chunks:
            async for chunk in chunks:
                collected.add(chunk)
        return collected


@dataclass
class Collected:
    """A stream put together."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[types_pb2.PositionLogprobs]] = field(default_factory=dict)
    ends: dict[int, inference_pb2.Output] = field(default_factory=dict)
    chunks: list[inference_pb2.GenerateResponse] = field(default_factory=list)

    def add(self, chunk: inference_pb2.GenerateResponse) -> None:
        self.chunks.append(chunk)
        for output in chunk.outputs:
            known = self.token_ids.setdefault(output.index, [])
            assert output.position == len(known), "a gap or a repeat"
            assert output.index not in self.ends, "something after the end"
            known.extend(output.token_ids)
            self.texts[output.index] = self.texts.get(output.index, "") + output.text
            self.logprobs.setdefault(output.index, []).extend(output.logprobs)
            if output.finish_reason:
                self.ends[output.index] = output

    @property
    def last(self) -> inference_pb2.GenerateResponse:
        return self.chunks[-1]


def request(
    prompt: Sequence[int] | str = "hello world", max_tokens: int = 6, **fields: Any
) -> inference_pb2.GenerateRequest:
    """A request; what is no field of GenerateRequest is a sampling parameter."""
    own = {name: fields.pop(name) for name in ("request_id", "cache_salt", "priority", "model") if name in fields}
    sampling = types_pb2.SamplingParams(max_tokens=max_tokens, **fields)
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt, sampling=sampling, **own)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling, **own)


@asynccontextmanager
async def scene_of(
    prefill: int = 1,
    decode: int = 1,
    prepare: Callable[[Scene], None] | None = None,
    resolve: Resolve = resolve,
    embeds: bool = False,
    **gateway: Any,
) -> AsyncIterator[Scene]:
    """Starts workers, a gateway and its server; `gateway` are fields of its configuration.

    embeds: the model answers vectors, and no decode worker is there.
    """
    transport, auth = gateway.pop("transport", {}), gateway.pop("auth", {})
    prefills = [ScriptedPrefill(f"p{i}") for i in range(prefill)]
    decodes = [] if embeds else [ScriptedDecode(f"d{i}") for i in range(decode)]
    async with AsyncExitStack() as stack:
        draft = Scene(prefills, decodes, None, None, None, WatchedMetrics())  # type: ignore[arg-type]
        if prepare is not None:
            prepare(draft)
        for worker in (*prefills, *decodes):
            await worker.start()
            stack.push_async_callback(worker.kill)
        config = TandemConfig(
            served_name="scripted",
            gateway={  # type: ignore[arg-type]
                "prefill_workers": tuple(worker.target for worker in prefills),
                **({} if embeds else {"decode_workers": tuple(worker.target for worker in decodes)}),
                **gateway,
            },
            transport=transport,
            auth=auth,
        )
        draft.gateway = await stack.enter_async_context(Gateway(config, model(embeds=embeds), draft.metrics, resolve))
        await draft.gateway.ready()
        server = create_server()
        port = server.add_insecure_port("127.0.0.1:0")
        access = Access(config.auth.api_keys)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(draft.gateway, access), server)
        await Health(server, [SERVICE_NAME]).set(True)
        await server.start()
        stack.push_async_callback(server.stop, None)
        draft.channel = await stack.enter_async_context(connect(f"127.0.0.1:{port}"))
        draft.stub = inference_pb2_grpc.InferenceServiceStub(draft.channel)  # type: ignore[assignment]
        yield draft
