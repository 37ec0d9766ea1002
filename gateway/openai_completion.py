"""POST /v1/completions: prompts to continue, as text or as token ids."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator
from tandem.v1 import inference_pb2

from gateway.openai_error import bad_request
from gateway.openai_schema import OpenAIRequest, Uint32

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions only


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

    FIELD_NAMES: ClassVar[dict[str, str]] = {"text": "prompt", "token_ids.ids": "prompt", "token_ids": "prompt"}

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
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        sampling = self.sampling(max_tokens, self.logprobs)
        return [
            self.request(sampling, text=prompt)
            if isinstance(prompt, str)
            else self.request(sampling, token_ids=inference_pb2.TokenIds(ids=prompt))
            for prompt in self.prompt
        ]
