"""What a prefill and a decode are asked to continue, checked field by field before anything else sees it.

Both `PrefillRequest` and `Admit` carry these fields under the same names. Whatever is out of its range is refused with
INVALID_ARGUMENT that names the field; nothing behind this file needs to check, or assert, it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.v1 import decode_pb2, prefill_pb2, types_pb2

from shared.rpc import RpcError, invalid, not_found
from shared.sampling_params import SamplingParams

MAX_NAME_CHARACTERS = 1024
# Unset is a legal value of these alone: nothing is reported.
OPTIONAL_FIELDS = frozenset({"logprobs", "prompt_logprobs"})
SCALAR_FIELDS = tuple(
    f.name for f in types_pb2.SamplingParams.DESCRIPTOR.fields if f.has_presence and f.name != "grammar"
)


@dataclass(frozen=True)
class Limits:
    """What a worker can take."""

    model: str
    vocab_size: int
    max_context: int  # tokens of prompt and output together
    block_tokens: int
    num_blocks: int  # that requests can use


@dataclass(frozen=True)
class TokenRequest:
    """A token history, and which outputs continue it how."""

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    output_indices: tuple[int, ...]
    cache_salt: str
    priority: int

    @property
    def position(self) -> int:
        """Tokens generated already, which is the position of the next one in its output."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of the longest output."""
        return self.num_prompt_tokens + self.params.max_tokens


def read_token_request(
    message: prefill_pb2.PrefillRequest | decode_pb2.Admit, limits: Limits, prefix: str = ""
) -> TokenRequest:
    """Raises INVALID_ARGUMENT naming every field at fault, with `prefix` before it; NOT_FOUND for the model."""
    if message.model and message.model != limits.model:
        raise not_found("model", message.model, f"the model {message.model!r} is not served here; {limits.model!r} is")
    faults: list[tuple[str, str]] = []
    num_tokens = len(message.token_ids)
    if not num_tokens:
        faults.append(("token_ids", "is empty; at least one token is needed"))
    elif (largest := max(message.token_ids)) >= limits.vocab_size:
        faults.append(("token_ids", f"token {largest} is outside the vocabulary of {limits.vocab_size}"))
    if not 1 <= message.num_prompt_tokens <= max(num_tokens, 1):
        faults.append(
            ("num_prompt_tokens", f"must lie in [1, {num_tokens}] (token_ids), got {message.num_prompt_tokens}")
        )
    if not message.output_indices:
        faults.append(("output_indices", "is empty; at least one output is needed"))
    elif len(set(message.output_indices)) != len(message.output_indices):
        faults.append(("output_indices", "names an output twice"))
    faults += [
        (name, f"at most {MAX_NAME_CHARACTERS} characters, got {len(getattr(message, name))}")
        for name in ("request_id", "cache_salt")
        if len(getattr(message, name)) > MAX_NAME_CHARACTERS
    ]
    params, sampling_faults = _read_sampling(message.sampling, limits.vocab_size)
    faults += sampling_faults
    if params and not faults:
        faults += _check_sizes(message, params, limits)
    if faults or not params:
        raise _refuse(faults, prefix)
    return TokenRequest(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        params=params,
        output_indices=tuple(message.output_indices),
        cache_salt=message.cache_salt,
        priority=message.priority,
    )


def _read_sampling(
    message: types_pb2.SamplingParams, vocab_size: int
) -> tuple[SamplingParams | None, list[tuple[str, str]]]:
    faults = [
        (f"sampling.{name}", "is unset; between the gateway and a worker every parameter is resolved")
        for name in SCALAR_FIELDS
        if name not in OPTIONAL_FIELDS and not message.HasField(name)  # pyright: ignore[reportArgumentType]
    ]
    if message.HasField("grammar"):
        faults.append(("sampling.grammar", "is not served"))
    if faults:
        return None, faults
    values = {name: getattr(message, name) for name in SCALAR_FIELDS if message.HasField(name)}  # pyright: ignore[reportArgumentType]
    params = SamplingParams(
        **values,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )
    return params, [(f"sampling.{violation.field}", violation.description) for violation in params.validate(vocab_size)]


def _check_sizes(
    message: prefill_pb2.PrefillRequest | decode_pb2.Admit, params: SamplingParams, limits: Limits
) -> list[tuple[str, str]]:
    """What does not fit the model, or each other; the fields are in range by themselves."""
    faults: list[tuple[str, str]] = []
    if (highest := max(message.output_indices)) >= params.n:
        faults.append(("output_indices", f"output {highest} does not exist; sampling.n is {params.n}"))
    prompt, position = message.num_prompt_tokens, len(message.token_ids) - message.num_prompt_tokens
    if prompt >= limits.max_context:
        faults.append(
            ("token_ids", f"a prompt of {prompt} tokens leaves no room in a context of {limits.max_context} tokens")
        )
    elif prompt + params.max_tokens > limits.max_context:
        faults.append(
            (
                "sampling.max_tokens",
                f"{prompt} prompt tokens and max_tokens {params.max_tokens} exceed the context of {limits.max_context} "
                f"tokens; at most {limits.max_context - prompt} fit",
            )
        )
    if position >= params.max_tokens:
        faults.append(
            ("token_ids", f"{position} tokens are generated already and sampling.max_tokens is {params.max_tokens}")
        )
    return faults


def _refuse(faults: list[tuple[str, str]], prefix: str) -> RpcError:
    named = [(prefix + field, description) for field, description in faults]
    return invalid(*named[0], *named[1:])
