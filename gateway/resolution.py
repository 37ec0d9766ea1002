"""From what a client sent to what the workers get: the prompt as token ids, every sampling parameter set and in range.

Whatever is wrong is INVALID_ARGUMENT naming the field, NOT_FOUND for the model; nothing behind this file checks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tandem.v1 import inference_pb2, types_pb2

from gateway.model import SamplingDefaults, ServedModel
from shared.chat_template import ChatTemplateError
from shared.rpc import RpcError, invalid, not_found
from shared.sampling_params import SamplingParams, draw_seed

MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 256
MAX_MESSAGES = 4096
MAX_ROLE = 64
T = TypeVar("T")
# Below this, a thread costs more than it frees the event loop from.
_THREAD_CHARACTERS = 8192


@dataclass(frozen=True)
class Limits:
    """What the workers can take: max_context in tokens of prompt and output together, vocab_size in entries."""

    max_context: int
    vocab_size: int


def check_model(name: str, model: ServedModel) -> None:
    """Raises NOT_FOUND unless the name is empty or the served model's."""
    if name and name != model.name:
        raise not_found("model", name, f"the model {name!r} is not served here; {model.name!r} is")


def check_labels(request: inference_pb2.GenerateRequest) -> None:
    """The sizes of what a client names things."""
    check_request_id(request.request_id)
    if len(request.cache_salt) > MAX_CACHE_SALT:
        raise invalid("cache_salt", f"at most {MAX_CACHE_SALT} characters, got {len(request.cache_salt)}")


def check_request_id(request_id: str) -> None:
    """Raises INVALID_ARGUMENT for one that is too long, or that no log could show."""
    if len(request_id) > MAX_REQUEST_ID:
        raise invalid("request_id", f"at most {MAX_REQUEST_ID} characters, got {len(request_id)}")
    if not request_id.isprintable():
        raise invalid("request_id", "must be printable")


async def tokenize_prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, model: ServedModel, limits: Limits
) -> tuple[list[int], str]:
    """Token ids of a request's prompt, and the text that was tokenized ("" for token ids)."""
    # each of the longest tokens at the least, so a longer text cannot fit whatever it says
    max_bytes = limits.max_context * model.tokenizer.longest_token_bytes
    kind = request.WhichOneof("prompt")
    if kind == "token_ids" and isinstance(request, inference_pb2.GenerateRequest):
        token_ids, text = list(request.token_ids.ids), ""
        check_token_ids("token_ids.ids", token_ids, limits.vocab_size)
    elif kind == "text":
        text = request.text
        _check_bytes("text", text, max_bytes)
        token_ids = await _encode(model, text, add_special_tokens=True)
    elif kind == "messages":
        text = await _in_thread(len(request.messages.messages) > 64, lambda: _render(request, model, max_bytes))
        _check_bytes("messages", text, max_bytes)
        token_ids = await _encode(model, text, add_special_tokens=False)
    else:
        raise invalid("prompt", "is missing; set one of text, token_ids, messages")
    if not token_ids:
        raise invalid(kind, "has no tokens; at least one is needed")
    if len(token_ids) >= limits.max_context and isinstance(request, inference_pb2.GenerateRequest):
        raise invalid(
            kind,
            f"the prompt has {len(token_ids)} tokens, which leaves no room for output in the context of "
            f"{limits.max_context} tokens",
        )
    return token_ids, text


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises INVALID_ARGUMENT naming the first id that the model does not have."""
    if token_ids and max(token_ids) >= vocab_size:
        i = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise invalid(f"{field}[{i}]", f"token {token_ids[i]} is outside the vocabulary of {vocab_size}")


def resolve_sampling(
    sampling: types_pb2.SamplingParams, defaults: SamplingDefaults, num_prompt_tokens: int, limits: Limits
) -> types_pb2.SamplingParams:
    """Every parameter set: the request's, else the model's, else the contract's default. The seed is drawn if unset."""
    if sampling.HasField("grammar"):
        raise invalid("sampling.grammar", "is not served yet; leave it unset")
    left = limits.max_context - num_prompt_tokens

    def given(name: str) -> bool:
        return sampling.HasField(name)  # pyright: ignore[reportArgumentType]

    if given("max_tokens") and sampling.max_tokens > left:
        raise invalid(
            "sampling.max_tokens",
            f"{num_prompt_tokens} prompt tokens and max_tokens {sampling.max_tokens} exceed the context of "
            f"{limits.max_context} tokens; at most {left} fit",
        )
    params = SamplingParams(
        max_tokens=sampling.max_tokens if given("max_tokens") else left,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature if given("temperature") else defaults.temperature,
        top_p=sampling.top_p if given("top_p") else defaults.top_p,
        top_k=sampling.top_k if given("top_k") else defaults.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if given("seed") else draw_seed(),
        n=sampling.n if given("n") else 1,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=(
            sampling.repetition_penalty if given("repetition_penalty") else defaults.repetition_penalty
        ),
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=sampling.logprobs if given("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if given("prompt_logprobs") else None,
    )
    if violations := params.validate(limits.vocab_size):
        raise _refuse([(f"sampling.{violation.field}", violation.description) for violation in violations])
    return _to_proto(params)


def _to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        n=params.n,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def _refuse(faults: list[tuple[str, str]]) -> RpcError:
    return invalid(*faults[0], *faults[1:])


def _render(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, model: ServedModel, max_characters: int
) -> str:
    if model.chat_template is None:
        raise invalid("messages", f"the model {model.name!r} has no chat template; send text or token ids")
    turns = request.messages.messages
    if not turns:
        raise invalid("messages.messages", "is empty; at least one turn is needed")
    if len(turns) > MAX_MESSAGES:
        raise invalid("messages.messages", f"at most {MAX_MESSAGES} turns, got {len(turns)}")
    for i, turn in enumerate(turns):
        if not 1 <= len(turn.role) <= MAX_ROLE:
            raise invalid(f"messages.messages[{i}].role", f"must have 1 to {MAX_ROLE} characters, got {len(turn.role)}")
    try:
        return model.chat_template.render(
            [{"role": turn.role, "content": turn.content} for turn in turns], max_characters=max_characters
        )
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from error


def _check_bytes(field: str, text: str, max_bytes: int) -> None:
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        raise invalid(field, f"the prompt has more than {max_bytes} bytes, which cannot fit the model's context")


async def _encode(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    return await _in_thread(
        len(text) > _THREAD_CHARACTERS, lambda: model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    )


async def _in_thread(worthwhile: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if worthwhile else work()
