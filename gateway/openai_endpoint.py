"""A route of the OpenAI API: from a body to an answer, and to nothing at all when the client leaves."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import grpc
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from tandem.v1 import inference_pb2

from gateway.merged_stream import MergedStream
from gateway.metrics import Metrics
from gateway.openai_answer import Answer, Batch, dump, event
from gateway.openai_completion import CompletionRequest
from gateway.openai_error import OpenAIError, from_rpc
from gateway.openai_reply import Envelope, Format
from gateway.openai_schema import Body, OpenAIRequest
from shared import rpc
from shared.auth import Access
from shared.config import ApiKey

CLIENT_CLOSED = 499  # nobody reads it; the metric shows it
Respond = Callable[[Response], Awaitable[int]]


class Backend(Protocol):
    """What the HTTP port needs of the gateway."""

    metrics: Metrics

    def generate(
        self, request: inference_pb2.GenerateRequest, *, budget_s: float | None, resumable: bool
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]: ...

    async def embed(
        self, request: inference_pb2.EmbedRequest, *, budget_s: float | None
    ) -> inference_pb2.EmbedResponse: ...

    def models(self) -> Sequence[inference_pb2.Model]: ...

    def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse: ...

    @property
    def serving(self) -> bool: ...


class Endpoint:
    """An ASGI application. A client that goes away takes its requests with it, answered or not."""

    def __init__(self, gateway: Backend, access: Access, kind: type[Body], max_body_bytes: int) -> None:
        self._gateway = gateway
        self._access = access
        self._kind = kind
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def respond(response: Response) -> int:
            await response(scope, receive, send)
            return response.status_code

        try:
            body = await read_body(Request(scope, receive), self._max_body_bytes)
            status = await until_disconnect(receive, self._serve(body, scope["api_key"], respond, send))
        except OpenAIError as error:
            status = await respond(error_response(error))
        except ClientDisconnect:
            status = CLIENT_CLOSED
        self._gateway.metrics.http_finished(scope["path"], status)

    @abstractmethod
    async def _serve(self, body: bytes, key: ApiKey, respond: Respond, send: Send) -> int:
        """Answers, a failure too, and returns the status."""

    def _model(self, request: Body) -> inference_pb2.Model:
        """The model asked for; the first is the default. One that is not served is the gateway's to refuse."""
        for model in self._gateway.models():
            if request.model in (None, "", model.name):
                return model
        return inference_pb2.Model(name=request.model or "")

    def _failure(self, error: Exception) -> OpenAIError:
        if isinstance(error, OpenAIError):
            return error
        if isinstance(error, grpc.aio.AioRpcError):
            error = rpc.from_grpc(error)
        return from_rpc(error if isinstance(error, rpc.RpcError) else rpc.internal(error), self._kind.FIELD_NAMES)


class GenerationEndpoint(Endpoint):
    """A route that generates."""

    _kind: type[OpenAIRequest]

    def __init__(
        self, gateway: Backend, access: Access, kind: type[OpenAIRequest], style: Format, max_body_bytes: int
    ) -> None:
        super().__init__(gateway, access, kind, max_body_bytes)
        self._style = style

    async def _serve(self, body: bytes, key: ApiKey, respond: Respond, send: Send) -> int:
        """Answers and returns the status. A failure before the first token has a status of its own."""
        try:
            request = self._kind.parse(body)
            protos = request.to_protos()
            model = self._model(request)
            prefixes = [self._echo(request, proto) for proto in protos]
            with ExitStack() as places:
                for _ in protos:
                    places.enter_context(self._access.admit(key, model.name))
                streams = [self._gateway.generate(p, budget_s=request.deadline_s, resumable=False) for p in protos]
                async with MergedStream(streams) as merged:
                    first = await merged.ready()
                    envelope = Envelope(self._style.id_prefix + _request_id(first), model.name, model.digest)
                    answer = Answer(self._style, envelope, request.num_outputs, prefixes)
                    headers = {"x-request-id": envelope.id}
                    if request.stream:
                        events = answer.events(first, merged, request.include_usage)
                        return await self._send_events(events, headers, send)
                    value = await answer.whole(first, merged)
        except Exception as error:
            return await respond(error_response(self._failure(error)))
        return await respond(json_response(value, headers=headers))

    async def _send_events(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], send: Send) -> int:
        """A failure in mid-stream is an event; no [DONE] follows, so that the stream cannot pass for whole."""
        # proxies that buffer would hold tokens back
        head = Response(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream"
        )
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": head.status_code, "headers": head.raw_headers})
        try:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            failure = event(self._failure(error).body)
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return head.status_code

    def _echo(self, request: OpenAIRequest, proto: inference_pb2.GenerateRequest) -> str:
        """What the outputs begin with: the prompt, if it is to be echoed."""
        if not (isinstance(request, CompletionRequest) and request.echo):
            return ""
        if proto.HasField("text"):
            return proto.text
        tokens = inference_pb2.DetokenizeRequest(model=proto.model, token_ids=proto.token_ids.ids)
        return self._gateway.detokenize(tokens).text


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body; OpenAIError 413 as soon as it is known to be larger than `max_bytes`."""
    too_large = OpenAIError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, int]) -> int:
    """Runs `work`, the body being read; cancels it and raises ClientDisconnect when the client goes away."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, media_type="application/json")


def error_response(error: OpenAIError) -> Response:
    return json_response(error.body, error.status, error.headers)


def _request_id(batch: Batch) -> str:
    return next((reply.request_id for _, reply in batch if reply.request_id), "")
