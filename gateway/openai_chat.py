"""POST /v1/chat/completions: a conversation to answer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field
from tandem.v1 import inference_pb2

from gateway.openai_error import bad_request
from gateway.openai_schema import OpenAIRequest, Schema, Uint32


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

    FIELD_NAMES: ClassVar[dict[str, str]] = {
        "messages.messages": "messages",
        "prompt": "messages",
        "logprobs": "top_logprobs",
    }

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
        sampling = self.sampling(limits.pop() if limits else None, (self.top_logprobs or 0) if self.logprobs else None)
        messages = [message.to_proto(i) for i, message in enumerate(self.messages)]
        return [self.request(sampling, messages=inference_pb2.ChatMessages(messages=messages))]
