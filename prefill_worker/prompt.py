"""A prompt in the scheduler, and what the scheduler tells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shared.logprobs import TokenLogprobs
from shared.rpc import RpcError
from shared.sampling import Sampled
from shared.sequence import Sequence


@dataclass(frozen=True)
class Computed:
    """Blocks that are final: full ones, and at the prompt's end the partly filled one."""

    blocks: list[int]
    first_token: int  # position of the first token in the first block
    num_tokens: int
    mark: int  # of the device, by which their content is there


@dataclass(frozen=True)
class Done:
    """The whole prompt is computed, and every block was announced before."""

    tokens: list[tuple[int, Sampled]]  # output index, its first token
    prompt_logprobs: list[TokenLogprobs]
    cached_tokens: int
    queue_s: float
    compute_s: float


@dataclass(frozen=True)
class Failed:
    """Nothing more will come; the blocks are freed already."""

    error: RpcError


Event = Computed | Done | Failed


@dataclass(eq=False)
class Prompt:
    """Belongs to the engine thread once submitted.

    skip_tokens: leading tokens that are not announced. receive: called on the event loop with each Event.
    """

    sequence: Sequence
    skip_tokens: int
    receive: Callable[[Event], None]
    arrived_s: float
    arrival: int = 0  # order of arrival, given by the scheduler
    started_s: float | None = None  # of the first chunk
    cached_tokens: int = 0
    announced_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def queue_key(self) -> tuple[int, int]:
        """The lower goes first: higher priority, then earlier arrival."""
        return (-self.sequence.request.priority, self.arrival)

    @property
    def uses_cache(self) -> bool:
        """Log-probabilities of prompt tokens come from computing them."""
        return self.sequence.request.params.prompt_logprobs is None
