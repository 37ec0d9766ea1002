"""A request in the scheduler, its sequences, and what the scheduler tells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from shared.logprobs import TokenLogprobs
from shared.rpc import RpcError
from shared.sampling import Sampled
from shared.sequence import Sequence
from shared.sequence_state import SequenceState
from shared.token_request import TokenRequest


@dataclass(frozen=True)
class Reserved:
    """Blocks for the whole history are held; the first `held_tokens` have their KV already.

    mark: of the device, before which steps may still use the other blocks.
    """

    blocks: list[int]
    held_tokens: int
    queue_s: float
    mark: int


Finish = Literal["stop", "length"] | None


@dataclass(frozen=True)
class NewToken:
    """The next token of an output; `sampled` is None for an end without one."""

    index: int
    position: int
    sampled: Sampled | None
    finish: Finish


@dataclass(frozen=True)
class NewTokens:
    """What a step brought a request."""

    attempt: int
    tokens: list[NewToken]
    preemptions: int
    cached_tokens: int
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Ended:
    """Every output has ended, and the blocks are free."""

    attempt: int


@dataclass(frozen=True)
class Failed:
    """Nothing more will come; the blocks are free."""

    error: RpcError


Event = Reserved | NewTokens | Ended | Failed


class State(Enum):
    """WAITING for blocks, RESERVED and importing, RUNNING its members, ENDED and holding nothing."""

    WAITING = auto()
    RESERVED = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(eq=False)
class Group:
    """A request. Belongs to the engine thread once submitted. receive: called on the event loop with each Event."""

    request: TokenRequest
    receive: Callable[[Event], None]
    arrived_s: float
    arrival: int = 0  # order of arrival, given by the scheduler
    state: State = State.WAITING
    attempt: int = 0
    held_tokens: int | None = None  # as the gateway was told; None before the first reservation
    blocks: list[int] = field(default_factory=list)  # while RESERVED
    spare: list[int] = field(default_factory=list)  # while RESERVED: for the forks' copies of the last block
    members: list[Member] = field(default_factory=list)  # while RUNNING
    unwanted: set[int] = field(default_factory=set)  # outputs whose client needs no more
    preemptions: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # to be sent with the next tokens

    @property
    def queue_key(self) -> tuple[int, int, int]:
        """The lower goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrival, -1)


@dataclass(eq=False)
class Member:
    """One sequence of a running request: the prompt while it is computed here, then an output.

    Running, it holds blocks. Preempted, it holds none, and `saved` is what the blocks of its computed tokens held,
    unless they are to be computed again. order: among the members of the group.
    """

    group: Group
    sequence: Sequence
    order: int = 0
    spare: list[int] = field(default_factory=list)
    saved: SequenceState | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def queue_key(self) -> tuple[int, int, int]:
        """Of two members, the one with the higher key is preempted first."""
        return (*self.group.queue_key[:2], self.order)

    @property
    def ends(self) -> bool:
        """Whether the last of the tokens that are on their way is the last that is asked for."""
        sequence = self.sequence
        return sequence.pending > 0 and sequence.position + sequence.pending >= self.group.request.params.max_tokens

    def spares_needed(self, block_tokens: int) -> int:
        """Blocks for the copies of a partly filled last block, once the outputs part."""
        return spares_needed(len(self.sequence.tokens), len(self.sequence.indices), block_tokens)


def spares_needed(num_tokens: int, num_outputs: int, block_tokens: int) -> int:
    """Outputs share full blocks, and each but the first gets a copy of a partly filled one."""
    return num_outputs - 1 if num_tokens % block_tokens else 0
