"""A request that was checked and resolved: what every leg of it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.v1 import decode_pb2, prefill_pb2, types_pb2

from gateway.budget import Budget
from gateway.output import Output


@dataclass(frozen=True)
class Job:
    """prompt: token ids. prefix: hashes of the prompt's leading blocks, for routing."""

    request_id: str
    model: str
    prompt: Sequence[int]
    sampling: types_pb2.SamplingParams
    cache_salt: str
    priority: int
    budget: Budget
    prefix: Sequence[bytes]

    def history(self, outputs: Sequence[Output]) -> list[int]:
        """The token history that the outputs of a leg share."""
        return [*self.prompt, *outputs[0].token_ids]

    def admit(self, outputs: Sequence[Output]) -> decode_pb2.Admit:
        """Asks a decode worker for blocks."""
        return decode_pb2.Admit(
            request_id=self.request_id,
            model=self.model,
            token_ids=self.history(outputs),
            num_prompt_tokens=len(self.prompt),
            sampling=self.sampling,
            output_indices=[output.index for output in outputs],
            cache_salt=self.cache_salt,
            priority=self.priority,
        )

    def prefill(self, admit: decode_pb2.Admit, attempt: int, skip_tokens: int) -> prefill_pb2.PrefillRequest:
        """Asks a prefill worker for the history of a leg, as it was admitted."""
        return prefill_pb2.PrefillRequest(
            request_id=self.request_id,
            attempt=attempt,
            model=self.model,
            token_ids=admit.token_ids,
            num_prompt_tokens=admit.num_prompt_tokens,
            sampling=self.sampling,
            output_indices=admit.output_indices,
            skip_tokens=skip_tokens,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )
