"""The time that a client gives a request: one budget over queue, prefill, handoff and decode."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from shared.rpc import RpcError, deadline


@dataclass(frozen=True)
class Budget:
    """total_s: seconds given; ends_at: when they are over, on time.monotonic()'s clock, which is asyncio's too."""

    total_s: float
    ends_at: float

    @classmethod
    def of(cls, total_s: float) -> Budget:
        """A budget that starts now."""
        return cls(total_s, time.monotonic() + total_s)

    @property
    def left_s(self) -> float:
        """Seconds left, 0 when it is spent."""
        return max(0.0, self.ends_at - time.monotonic())

    def enforce(self) -> asyncio.Timeout:
        """A block that raises TimeoutError when the budget is spent."""
        return asyncio.timeout_at(asyncio.get_running_loop().time() + self.left_s)

    def spent(self, where: str) -> RpcError:
        """DEADLINE_EXCEEDED, saying what the request was waiting for."""
        return deadline(f"the request's budget of {self.total_s:.3g} s was spent {where}")
