"""The resolved sampling parameters of one request, their limits, and when a token ends a sequence. No torch here."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

MAX_SAMPLES = 128
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
# float32 stays finite through bias, repetition penalty and temperature within these, so that no request can make an
# infinite logit and with it a row without a distribution.
MIN_TEMPERATURE = 1e-5
MAX_TEMPERATURE = 1e6
MAX_PENALTY = 1e6
MAX_REPETITION_PENALTY = 1e6
MAX_LOGIT_BIAS = 1e9


class Violation(NamedTuple):
    """One refused field, in the shape of google.rpc.BadRequest.FieldViolation."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Every default is "off"; `seed` has none, because an unset seed is drawn and echoed.

    temperature 0 is greedy, and the only way to say it; the filters are then without effect, penalties are not.
    top_k 0, top_p 1 and min_p 0 are off. `logprobs` None reports nothing, 0 the chosen token only, k the k best too.
    """

    max_tokens: int
    seed: int  # unsigned 64 bit
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Whether sampling needs the tokens that came before."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    def ending_ids(self, eos_token_ids: Sequence[int]) -> frozenset[int]:
        """The tokens that end a sequence, and that `min_tokens` holds back."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))

    def validate(self, vocab_size: int) -> list[Violation]:
        """Every value out of its range, each with the range it must lie in; empty when all is well."""
        found: list[Violation] = []

        def require(holds: bool, field: str, description: str) -> None:
            if not holds:
                found.append(Violation(field, description))

        def within(field: str, low: float, high: float) -> None:
            value = getattr(self, field)
            require(low <= value <= high, field, f"must lie in [{low:g}, {high:g}], got {value}")

        require(self.max_tokens >= 1, "max_tokens", f"must be at least 1, got {self.max_tokens}")
        require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must lie in [0, max_tokens = {self.max_tokens}], got {self.min_tokens}",
        )
        require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            "temperature",
            f"must be 0 (greedy) or lie in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got {self.temperature}",
        )
        require(0 < self.top_p <= 1, "top_p", f"must lie in (0, 1], where 1 is off, got {self.top_p}")
        require(self.top_k >= 0, "top_k", f"must be at least 0, where 0 is off, got {self.top_k}")
        require(0 <= self.min_p <= 1, "min_p", f"must lie in [0, 1], where 0 is off, got {self.min_p}")
        require(0 <= self.seed < 2**64, "seed", f"must be an unsigned 64-bit integer, got {self.seed}")
        within("n", 1, MAX_SAMPLES)
        within("presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        within("frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        within("repetition_penalty", 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                within(field, 0, min(MAX_LOGPROBS, vocab_size))

        require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for i, text in enumerate(self.stop[:MAX_STOP_STRINGS]):
            require(
                1 <= len(text) <= MAX_STOP_CHARACTERS,
                f"stop[{i}]",
                f"must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(text)}",
            )
        require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}",
        )
        for i, token_id in enumerate(self.stop_token_ids[:MAX_STOP_TOKEN_IDS]):
            require(0 <= token_id < vocab_size, f"stop_token_ids[{i}]", _outside_vocabulary(token_id, vocab_size))
        require(
            len(self.logit_bias) <= MAX_LOGIT_BIASES,
            "logit_bias",
            f"at most {MAX_LOGIT_BIASES} entries, got {len(self.logit_bias)}",
        )
        require(
            len({token_id for token_id, _ in self.logit_bias}) == len(self.logit_bias),
            "logit_bias",
            "names a token twice",
        )
        for token_id, bias in self.logit_bias[:MAX_LOGIT_BIASES]:
            field = f"logit_bias[{token_id}]"
            require(0 <= token_id < vocab_size, field, _outside_vocabulary(token_id, vocab_size))
            require(
                math.isfinite(bias) and abs(bias) <= MAX_LOGIT_BIAS,
                field,
                f"must lie in [{-MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}], got {bias}",
            )
        return found


def draw_seed() -> int:
    """A seed for a request that named none: 53 bits, so that any JSON reader can echo it without rounding."""
    return secrets.randbits(53)


def finish_reason(
    params: SamplingParams, token_id: int, num_output: int, eos_token_ids: Sequence[int]
) -> Literal["stop", "length"] | None:
    """Why the sequence ends with `token_id`, its `num_output`-th generated token (from 1), or None if it goes on.

    Stop strings are not known here: only the gateway, which detokenizes, can see them.
    """
    if token_id in params.ending_ids(eos_token_ids):
        return "stop"
    return "length" if num_output >= params.max_tokens else None


def _outside_vocabulary(token_id: int, vocab_size: int) -> str:
    return f"token {token_id} is outside the vocabulary of {vocab_size}"
