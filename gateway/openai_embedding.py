"""POST /v1/embeddings: vectors of texts, or of token ids.

Fields beyond OpenAI's (normalize, truncation, priority, deadline_s) go in the body too.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PlainValidator
from starlette.types import Send
from tandem.v1 import inference_pb2

from gateway.openai_endpoint import Backend, Endpoint, Respond, error_response, json_response
from gateway.openai_schema import Body, Uint32
from shared.auth import Access
from shared.config import ApiKey

_TRUNCATIONS = {"end": inference_pb2.TRUNCATION_END, "start": inference_pb2.TRUNCATION_START}


def _input_list(value: Any) -> Any:
    """A text, token ids, or a list of either, as a list of inputs."""
    if isinstance(value, str) or (isinstance(value, list) and any(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, token ids, or a list of either")
    for item in value:
        # ids are range-checked here, not by a union whose messages would speak of text
        if isinstance(item, list):
            if not item or not all(type(token) is int and 0 <= token < 2**32 for token in item):
                raise ValueError("token ids must be whole numbers of 0 or more, at least one")
        elif not isinstance(item, str):
            raise ValueError("must be a text, token ids, or a list of either")
    return value


class EmbeddingRequest(Body):
    """POST /v1/embeddings"""

    FIELD_NAMES: ClassVar[dict[str, str]] = {"inputs": "input"}

    input: Annotated[list[str | list[int]], PlainValidator(_input_list)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Uint32 | None = None
    normalize: bool | None = None
    truncation: Literal["end", "start"] | None = None

    def to_proto(self) -> inference_pb2.EmbedRequest:
        return inference_pb2.EmbedRequest(
            model=self.model or "",
            inputs=[
                inference_pb2.EmbedInput(text=each)
                if isinstance(each, str)
                else inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=each))
                for each in self.input
            ],
            dimensions=self.dimensions,
            normalize=self.normalize,
            truncation=_TRUNCATIONS[self.truncation] if self.truncation else inference_pb2.TRUNCATION_UNSPECIFIED,
            priority=self.priority or 0,
        )


class EmbeddingEndpoint(Endpoint):
    """The route."""

    def __init__(self, gateway: Backend, access: Access, max_body_bytes: int) -> None:
        super().__init__(gateway, access, EmbeddingRequest, max_body_bytes)

    async def _serve(self, body: bytes, key: ApiKey, respond: Respond, send: Send) -> int:
        try:
            request = EmbeddingRequest.parse(body)
            model = self._model(request).name
            with self._access.admit(key, model):
                reply = await self._gateway.embed(request.to_proto(), budget_s=request.deadline_s)
        except Exception as error:
            return await respond(error_response(self._failure(error)))
        encoded = request.encoding_format == "base64"
        return await respond(json_response(_answer(reply, model, encoded=encoded), headers=_headers(reply)))


def _answer(reply: inference_pb2.EmbedResponse, model: str, *, encoded: bool) -> dict[str, Any]:
    tokens = reply.usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": in_base64(each.values) if encoded else list(each.values),
            }
            for i, each in enumerate(reply.embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _headers(reply: inference_pb2.EmbedResponse) -> dict[str, str]:
    return {"x-request-id": f"embd-{reply.request_id}"}


def in_base64(values: Sequence[float]) -> str:
    """Little-endian float32 values, as OpenAI's clients read them."""
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
