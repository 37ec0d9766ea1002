"""The HTTP port: OpenAI's API, health, metrics and a web page. A thin skin over the gateway.

| route | key | |
|---|---|---|
| `POST /v1/completions`, `POST /v1/chat/completions` | yes | generation, whole or as server-sent events |
| `POST /v1/embeddings` | yes | vectors |
| `GET /v1/models`, `GET /v1/models/{id}` | yes | the models served |
| `GET /metrics` | yes | Prometheus text |
| `GET /healthz` | no | 200 while a request can be answered, else 503 |
| `GET /` | no | a page to try the model |
"""

from __future__ import annotations

import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.metrics import CONTENT_TYPE
from gateway.openai_chat import ChatRequest
from gateway.openai_completion import CompletionRequest
from gateway.openai_embedding import EmbeddingEndpoint
from gateway.openai_endpoint import Backend, GenerationEndpoint, error_response, json_response
from gateway.openai_error import OpenAIError, from_rpc
from gateway.openai_reply import ChatFormat, CompletionFormat, model_object
from shared import rpc
from shared.auth import Access

PAGE = Path(__file__).with_name("page.html")
KEYLESS = frozenset({"/", "/healthz"})


def create_app(gateway: Backend, access: Access, *, max_body_bytes: int = rpc.MAX_MESSAGE_BYTES) -> Starlette:
    """The ASGI application. Bodies beyond `max_body_bytes` are refused with 413."""
    started = int(time.time())

    async def models(request: Request) -> Response:
        listed = [model_object(model, started) for model in gateway.models()]
        return json_response({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        for found in gateway.models():
            if found.name == name:
                return json_response(model_object(found, started))
        message = f"no model is called {name!r}"
        return error_response(OpenAIError(404, message, param="model", code="model_not_found"))

    async def healthz(request: Request) -> Response:
        serving = gateway.serving
        return json_response({"status": "serving" if serving else "not serving"}, 200 if serving else 503)

    async def metrics(request: Request) -> Response:
        return Response(gateway.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, media_type="text/html")

    async def not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(OpenAIError(error.status_code, message, headers=dict(error.headers or {})))

    completions = GenerationEndpoint(gateway, access, CompletionRequest, CompletionFormat(), max_body_bytes)
    chat = GenerationEndpoint(gateway, access, ChatRequest, ChatFormat(), max_body_bytes)
    return Starlette(
        routes=[
            Route("/", page),
            Route("/healthz", healthz),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", EmbeddingEndpoint(gateway, access, max_body_bytes), methods=["POST"]),
        ],
        middleware=[Middleware(RequireKey, access=access)],
        exception_handlers={HTTPException: not_routed},
    )


class RequireKey:
    """Answers 401 to requests without a known key; the key found goes on as `scope["api_key"]`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in KEYLESS:
            try:
                scope["api_key"] = self._access.identify(Request(scope).headers.get("authorization"))
            except rpc.RpcError as error:
                failure = from_rpc(error)
                failure.headers["www-authenticate"] = "Bearer"
                await error_response(failure)(scope, receive, send)
                return
        await self._app(scope, receive, send)
