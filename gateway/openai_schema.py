"""Requests of the OpenAI API: what is understood, what is ignored, what is refused, and the GenerateRequest they mean.

A field that changes the result and cannot be honoured is refused by its name; one that changes nothing is ignored.
Fields beyond OpenAI's (top_k, min_p, ignore_eos, cache_salt, deadline_s, ...) go in the body too: `extra_body` of the
Python package.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json
from tandem.v1 import inference_pb2, types_pb2

from gateway.openai_error import OpenAIError, bad_request

MAX_PROMPTS = 256
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens, for completions only

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


class OpenAIRequest(Schema):
    """What both kinds of requests have in common."""

    # names of this API for fields of GenerateRequest, where they differ, the more specific first
    FIELD_NAMES: ClassVar[dict[str, str]] = {}

    model: str | None = None
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
    priority: Int32 | None = None
    cache_salt: str | None = None
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

    @property
    def num_outputs(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @abstractmethod
    def to_protos(self) -> list[inference_pb2.GenerateRequest]:
        """The requests that this one stands for. Raises OpenAIError 400 for what is understood but not supported."""

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> types_pb2.SamplingParams:
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

    def _request(self, sampling: types_pb2.SamplingParams, **prompt: Any) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            model=self.model or "",
            sampling=sampling,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            **prompt,
        )


def _prompt_list(value: Any) -> Any:
    """A text, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and any(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, token ids, or a list of either")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts, got {len(value)}")
    for prompt in value:
        # ids are range-checked here, not by a union whose messages would speak of text
        if isinstance(prompt, list):
            if not prompt or not all(type(item) is int and 0 <= item < 2**32 for item in prompt):
                raise ValueError("token ids must be whole numbers of 0 or more, at least one")
        elif not isinstance(prompt, str):
            raise ValueError("must be a text, token ids, or a list of either")
    return value


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions"""

    FIELD_NAMES = {"text": "prompt", "token_ids.ids": "prompt", "token_ids": "prompt"}

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompt_list)]
    logprobs: Uint32 | None = None
    echo: bool | None = None
    best_of: Uint32 | None = None

    def to_protos(self) -> list[inference_pb2.GenerateRequest]:
        """One request for each prompt."""
        if self.best_of not in (None, self.num_outputs):
            raise bad_request("best_of", "best_of: only best_of = n is supported", "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise bad_request("echo", "echo: not supported together with logprobs", "unsupported_parameter")
        max_tokens = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        sampling = self._sampling(max_tokens, self.logprobs)
        return [
            self._request(sampling, text=prompt)
            if isinstance(prompt, str)
            else self._request(sampling, token_ids=inference_pb2.TokenIds(ids=prompt))
            for prompt in self.prompt
        ]


def _part_list(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ContentPart(Schema):
    model_config = ConfigDict(extra="ignore")

    type: str
    text: str | None = None


class Message(Schema):
    """One turn. Clients send back what they were answered, so null fields of answers are understood too."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: Annotated[list[ContentPart] | None, BeforeValidator(_part_list)] = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    tool_call_id: str | None = None
    audio: Any = None

    def to_proto(self, index: int) -> inference_pb2.ChatMessage:
        for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
            if getattr(self, name):
                param = f"messages[{index}].{name}"
                raise bad_request(param, f"{param}: not supported by this server", "unsupported_parameter")
        # OpenAI's newer name of the system role, which no chat template knows
        role = "system" if self.role == "developer" else self.role
        return inference_pb2.ChatMessage(role=role, content=self._text(index))

    def _text(self, index: int) -> str:
        texts = []
        for i, part in enumerate(self.content or ()):
            if part.type != "text" or part.text is None:
                param = f"messages[{index}].content[{i}]"
                raise bad_request(param, f"{param}: only parts of type text are supported, got {part.type!r}")
            texts.append(part.text)
        return "\n".join(texts)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions"""

    FIELD_NAMES = {"messages.messages": "messages", "prompt": "messages", "logprobs": "top_logprobs"}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None

    def to_protos(self) -> list[inference_pb2.GenerateRequest]:
        """The one request."""
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs", "top_logprobs: needs logprobs: true")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise bad_request("max_tokens", "max_tokens: differs from max_completion_tokens; give one of them")
        sampling = self._sampling(limits.pop() if limits else None, (self.top_logprobs or 0) if self.logprobs else None)
        messages = [message.to_proto(i) for i, message in enumerate(self.messages)]
        return [self._request(sampling, messages=inference_pb2.ChatMessages(messages=messages))]


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
