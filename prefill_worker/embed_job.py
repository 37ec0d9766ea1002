"""A request for vectors in the scheduler, and what the scheduler tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shared.rpc import RpcError


@dataclass(frozen=True)
class Embedded:
    """Every vector, float32 [width] each, in the order of the request's sequences."""

    vectors: list[Tensor]
    queue_s: float
    compute_s: float


@dataclass(frozen=True)
class EmbedFailed:
    """Nothing will come."""

    error: RpcError


@dataclass(eq=False)
class EmbedJob:
    """Belongs to the engine thread once submitted.

    width: values of each vector to keep. receive: called once, on the event loop.
    """

    sequences: Sequence[Sequence[int]]
    normalize: bool
    width: int
    priority: int
    receive: Callable[[Embedded | EmbedFailed], None]
    arrived_s: float
    arrival: int = 0  # order of arrival, given by the scheduler
    started_s: float | None = None
    vectors: list[Tensor] = field(default_factory=list)  # of the first sequences

    @property
    def queue_key(self) -> tuple[int, int]:
        """The lower goes first: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)

    @property
    def remaining(self) -> int:
        """Tokens still to compute."""
        return sum(map(len, self.sequences[len(self.vectors) :]))
