"""What happened to a request, for its usage, timings and receipt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.v1 import decode_pb2, inference_pb2, types_pb2

from gateway.output import Output


@dataclass
class Journal:
    """Moments are on time.monotonic()'s clock; the first of a kind counts, a recovery does not move it.

    token_gap: told the seconds between two chunks of an output.
    """

    gateway_id: str
    model_digest: str
    num_prompt_tokens: int
    token_gap: Callable[[float], None]
    arrived_at: float = field(default_factory=time.monotonic)
    stage: str = "before it was admitted"  # where the request is, for the error when its budget ends
    reserved_at: float | None = None
    first_token_at: float | None = None
    imported_at: float | None = None
    last_token_at: float | None = None
    cached_tokens: int | None = None
    attempts: int = 0
    handoff_bytes: int = 0
    transport: types_pb2.Transport.ValueType = types_pb2.TRANSPORT_UNSPECIFIED
    refusals: list[types_pb2.TransportRefusal] = field(default_factory=list)
    prefill_workers: list[str] = field(default_factory=list)
    decode_workers: list[str] = field(default_factory=list)
    _preemptions: dict[int, int] = field(default_factory=dict)  # leg → its last count
    _last_chunk_at: dict[int, float] = field(default_factory=dict)  # output index → moment

    def reserved(self) -> None:
        """A decode worker holds blocks."""
        self.stage = "while its prompt was computed"
        self.reserved_at = self.reserved_at or time.monotonic()

    def handing_over(self, *, local: bool) -> None:
        """A handoff begins."""
        self.attempts += 1
        if local:
            self.transport, self.refusals = types_pb2.TRANSPORT_UNSPECIFIED, []

    def prefilled(self, worker_id: str, cached_tokens: int) -> None:
        """A prefill worker gave first tokens."""
        self.prefill_workers.append(worker_id)
        self.found_cached(cached_tokens)

    def found_cached(self, num_tokens: int) -> None:
        """The first prefill's cache hit; a recovery's would count what the request itself left behind."""
        if self.cached_tokens is None:
            self.cached_tokens = min(num_tokens, self.num_prompt_tokens)

    def imported(self, event: decode_pb2.Imported) -> None:
        """A decode worker has every block of a handoff."""
        self.imported_at = self.imported_at or time.monotonic()
        self.transport, self.refusals = event.transport, list(event.refusals)
        self.handoff_bytes += event.handoff_bytes

    def decoded(self, leg: int, worker_id: str, preemptions: int) -> None:
        """A decode worker gave tokens on some leg."""
        if worker_id not in self.decode_workers:
            self.decode_workers.append(worker_id)
        self._preemptions[leg] = preemptions

    def produced(self, index: int) -> None:
        """New tokens of an output are here."""
        now = time.monotonic()
        self.stage = "while tokens were generated"
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        if index in self._last_chunk_at:
            self.token_gap(now - self._last_chunk_at[index])
        self._last_chunk_at[index] = now

    def last_message(self, outputs: Sequence[Output]) -> inference_pb2.GenerateResponse:
        """What goes with the last chunk."""
        return inference_pb2.GenerateResponse(
            usage=self.usage(outputs),
            timings=self.timings(),
            receipt=types_pb2.Receipt(
                gateway=self.gateway_id,
                prefill_workers=self.prefill_workers,
                decode_workers=self.decode_workers,
                transport=self.transport,
                refusals=self.refusals,
                handoff_bytes=self.handoff_bytes,
                attempts=self.attempts,
                model_digest=self.model_digest,
                preemptions=sum(self._preemptions.values()),
            ),
        )

    def usage(self, outputs: Sequence[Output]) -> types_pb2.Usage:
        """Tokens so far."""
        return types_pb2.Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=sum(len(output.token_ids) for output in outputs),
        )

    def timings(self) -> types_pb2.Timings:
        """Seconds so far; a phase that did not happen took none."""

        def between(start: float | None, end: float | None) -> float:
            return max(0.0, end - start) if start is not None and end is not None else 0.0

        return types_pb2.Timings(
            queue_s=between(self.arrived_at, self.reserved_at),
            prefill_s=between(self.reserved_at, self.first_token_at),
            handoff_s=between(self.first_token_at, self.imported_at),
            first_token_s=between(self.arrived_at, self.first_token_at),
            decode_s=between(self.first_token_at, self.last_token_at),
            total_s=between(self.arrived_at, self.last_token_at),
        )
