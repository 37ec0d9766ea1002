"""Requests of the OpenAI API: what is understood, what is ignored, what is refused, and the GenerateRequest they mean.

A field that changes the result and cannot be honoured is refused by its name; one that changes nothing is ignored.
Fields beyond OpenAI's (top_k, min_p, ignore_eos, cache_salt, deadline_s, ...) go in the body too: `extra_body` of the
Python package.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from tandem.v1 import inference_pb2, types_pb2

from gateway.openai_error import OpenAIError, bad_request

# Fields without an influence on the tokens. Any value passes.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that would change the result, with the values that ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias_by_id(value: Any) -> Any:
    """JSON's keys are strings; token ids are numbers."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isascii() and key.isdecimal() else key: bias for key, bias in value.items()}


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Schema):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; has no influence on the tokens


class Body(Schema):
    """A request's body."""

    # names of this API for fields of the request's proto, where they differ, the more specific first
    FIELD_NAMES: ClassVar[dict[str, str]] = {}

    model: str | None = None
    priority: Int32 | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Reads a request's body. Raises OpenAIError 400 that names the field at fault."""
        try:
            values = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise bad_request(None, f"the body is not JSON: {error}", "invalid_json") from None
        if not isinstance(values, dict):
            raise bad_request(None, "the body is not a JSON object", "invalid_json")
        for name, neutral in NEUTRAL.items():
            if (value := values.pop(name, None)) is not None and value not in neutral:
                raise bad_request(name, f"{name}: not supported by this server; leave it out", "unsupported_parameter")
        for name in IGNORED:
            values.pop(name, None)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _refusal(error) from None


class OpenAIRequest(Body):
    """What both kinds of requests that generate have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Uint32 | None = None
    min_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    n: Uint32 | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop_list)] = None
    stop_token_ids: list[Uint32] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[Uint32, float] | None, BeforeValidator(_bias_by_id)] = None
    cache_salt: str | None = None

    @property
    def num_outputs(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @abstractmethod
    def to_protos(self) -> list[inference_pb2.GenerateRequest]:
        """The requests that this one stands for. Raises OpenAIError 400 for what is understood but not supported."""

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> types_pb2.SamplingParams:
        """Everything that was given; the gateway resolves what was not."""
        return types_pb2.SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            # OpenAI's seeds are signed
            seed=None if self.seed is None else self.seed % 2**64,
            n=self.n,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
        )

    def request(self, sampling: types_pb2.SamplingParams, **prompt: Any) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            model=self.model or "",
            sampling=sampling,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            **prompt,
        )


def _refusal(error: ValidationError) -> OpenAIError:
    """The first violation, with its place as `messages[0].role`."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if part == "[key]":  # pydantic's mark of a key that is wrong, not its value
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if first["type"] == "extra_forbidden":
        return bad_request(param, f"{param}: unknown parameter", "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(param, f"{param}: missing", "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(param, f"{param}: {message[0].lower()}{message[1:]}")
