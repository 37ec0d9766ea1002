"""A request for vectors, from what a client sent to what a worker gets: token ids that fit, every choice made."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.v1 import inference_pb2, prefill_pb2, worker_pb2

from gateway.budget import Budget
from gateway.model import ServedModel
from gateway.resolution import Limits, check_request_id, check_token_ids
from shared.rpc import RpcError, invalid
from shared.tokenizer import Tokenizer

MAX_INPUTS = 2048
# Below this, a thread costs more than it frees the event loop from.
_THREAD_CHARACTERS = 8192
_BYTES_OF_A_REPLY = 64  # of a vector beside its values, and of the reply beside its vectors
_TRUNCATIONS = inference_pb2.Truncation.values()


@dataclass(frozen=True)
class Input:
    """One text as the worker gets it. truncated: tokens were left out."""

    token_ids: Sequence[int]
    truncated: bool


@dataclass(frozen=True)
class EmbeddingJob:
    """dimensions: values of each vector to keep."""

    request_id: str
    model: str
    inputs: Sequence[Input]
    normalize: bool
    dimensions: int
    priority: int
    budget: Budget

    @property
    def num_tokens(self) -> int:
        return sum(len(each.token_ids) for each in self.inputs)

    def to_proto(self, attempt: int) -> prefill_pb2.EmbedTokensRequest:
        """Asks a prefill worker for the vectors."""
        return prefill_pb2.EmbedTokensRequest(
            request_id=self.request_id,
            attempt=attempt,
            model=self.model,
            sequences=[prefill_pb2.TokenSequence(token_ids=each.token_ids) for each in self.inputs],
            normalize=self.normalize,
            dimensions=self.dimensions,
            priority=self.priority,
        )


async def resolve_embedding(
    request: inference_pb2.EmbedRequest,
    model: ServedModel,
    limits: Limits,
    info: worker_pb2.GetInfoResponse,
    budget: Budget,
    max_message_bytes: int,
) -> EmbeddingJob:
    """info: of a worker. Raises INVALID_ARGUMENT naming the field at fault."""
    check_request_id(request.request_id)
    size = info.embedding_size
    dimensions = request.dimensions if request.HasField("dimensions") else size
    if not 1 <= dimensions <= size:
        raise invalid("dimensions", f"must lie in [1, {size}], which the model's vectors have, got {dimensions}")
    if request.truncation not in _TRUNCATIONS:
        raise invalid("truncation", f"{request.truncation} is not a known value; leave it unset, or use END or START")
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise invalid("inputs", f"1 to {MAX_INPUTS}, got {len(request.inputs)}")
    reply_bytes = len(request.inputs) * (4 * dimensions + _BYTES_OF_A_REPLY) + _BYTES_OF_A_REPLY
    if reply_bytes > max_message_bytes:
        raise invalid(
            "inputs",
            f"{len(request.inputs)} vectors of {dimensions} values take {reply_bytes} bytes, and a message has "
            f"{max_message_bytes} at most; send fewer at once",
        )
    characters = sum(len(each.text) for each in request.inputs)
    if characters > _THREAD_CHARACTERS:
        inputs = await asyncio.to_thread(_read_inputs, request, model.tokenizer, limits)
    else:
        inputs = _read_inputs(request, model.tokenizer, limits)
    return EmbeddingJob(
        request_id=request.request_id or secrets.token_hex(8),
        model=model.name,
        inputs=inputs,
        normalize=request.normalize if request.HasField("normalize") else info.normalizes,
        dimensions=dimensions,
        priority=request.priority,
        budget=budget,
    )


def _read_inputs(request: inference_pb2.EmbedRequest, tokenizer: Tokenizer, limits: Limits) -> list[Input]:
    return [_read(i, each, request.truncation, tokenizer, limits) for i, each in enumerate(request.inputs)]


def _read(
    index: int,
    given: inference_pb2.EmbedInput,
    truncation: inference_pb2.Truncation.ValueType,
    tokenizer: Tokenizer,
    limits: Limits,
) -> Input:
    kind, most = given.WhichOneof("input"), limits.max_context
    field = f"inputs[{index}].{kind or 'input'}"
    if kind == "text":
        token_ids = tokenizer.encode(given.text)
    elif kind == "token_ids":
        token_ids = list(given.token_ids.ids)
        check_token_ids(f"{field}.ids", token_ids, limits.vocab_size)
    else:
        raise invalid(field, "is missing; set one of text, token_ids")
    if not token_ids:
        raise invalid(field, "has no tokens; at least one is needed")
    if len(token_ids) <= most:
        return Input(token_ids, truncated=False)
    if truncation == inference_pb2.TRUNCATION_UNSPECIFIED:
        raise _too_long(field, len(token_ids), most)
    start, end = _frame(given.text, token_ids, tokenizer) if kind == "text" else (0, 0)
    if start + end >= most:
        raise _too_long(field, len(token_ids), most)
    inner, room = token_ids[start : len(token_ids) - end], most - start - end
    kept = inner[:room] if truncation == inference_pb2.TRUNCATION_END else inner[-room:]
    return Input([*token_ids[:start], *kept, *token_ids[len(token_ids) - end :]], truncated=True)


def _frame(text: str, token_ids: list[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """How many special tokens stand before a text's own and how many behind."""
    own = tokenizer.encode(text, add_special_tokens=False)
    special = len(token_ids) - len(own)
    start = next((i for i in range(special + 1) if token_ids[i : i + len(own)] == own), 0)
    return start, special - start


def _too_long(field: str, num_tokens: int, most: int) -> RpcError:
    return invalid(field, f"has {num_tokens} tokens, and the model takes {most}; shorten it, or set truncation")
