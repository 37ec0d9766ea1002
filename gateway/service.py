"""InferenceService: the gRPC skin over the gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from tandem.v1 import inference_pb2, inference_pb2_grpc

from gateway.gateway import Gateway
from shared.auth import Access, bearer
from shared.rpc import handler

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Each method is a call of the gateway; the client's deadline becomes the budget.

    The streaming methods write instead of yielding: a cancelled call then unwinds them at once, wherever they are.
    """

    def __init__(self, gateway: Gateway, access: Access) -> None:
        self._gateway, self._access = gateway, access

    @handler
    async def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        key = self._access.identify(bearer(context.invocation_metadata()))
        model = self._gateway.model_name(request.model)
        with self._access.admit(key, model):
            chunks = self._gateway.generate(request, budget_s=context.time_remaining(), resumable=True, owner=key.name)
            await _send(context, chunks)

    @handler
    async def Resume(self, request: inference_pb2.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        key = self._access.identify(bearer(context.invocation_metadata()))
        await _send(context, self._gateway.resume(request, owner=key.name))

    @handler
    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.EmbedResponse:
        key = self._access.identify(bearer(context.invocation_metadata()))
        with self._access.admit(key, self._gateway.model_name(request.model)):
            return await self._gateway.embed(request, budget_s=context.time_remaining())

    @handler
    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        return await self._gateway.tokenize(request)

    @handler
    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        return self._gateway.detokenize(request)

    @handler
    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=self._gateway.models())


async def _send(context: grpc.aio.ServicerContext, chunks: AsyncGenerator[Any, None]) -> None:
    async with aclosing(chunks):
        async for chunk in chunks:
            await context.write(chunk)
