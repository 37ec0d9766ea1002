"""A token history on its way through a worker: its tokens, its blocks, and how far its KV is computed."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from shared.batch import BatchEntry
from shared.penalties import SampleRow, TokenHistory
from shared.token_request import TokenRequest


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, and the blocks that hold the KV of the first `num_computed` of them.

    indices: the outputs that continue these tokens. A prompt has all of its request's, a fork has one.
    pending: tokens after these that a device has drawn, or will before it computes on, and that are not known yet.
    """

    request: TokenRequest
    indices: tuple[int, ...]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    pending: int = 0
    _history: TokenHistory | None = None

    @classmethod
    def start(cls, request: TokenRequest) -> Sequence:
        """The history that a request came with, nothing of it computed."""
        return cls(request, request.output_indices, list(request.token_ids), _history=_history_of(request, ()))

    def fork(self, index: int, token_id: int) -> Sequence:
        """One output that goes on with its own token; blocks are the scheduler's to give."""
        tokens = [*self.tokens, token_id]
        history = _history_of(self.request, tokens[len(self.request.token_ids) :])
        return Sequence(self.request, (index,), tokens, num_computed=self.num_computed, _history=history)

    @property
    def position(self) -> int:
        """Tokens generated so far, which is the position of the next one in its output."""
        return len(self.tokens) - self.request.num_prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to compute; 1 in a decode step."""
        return len(self.tokens) + self.pending - self.num_computed

    @property
    def num_known(self) -> int:
        """Tokens that are known, and whose KV is computed."""
        return min(self.num_computed, len(self.tokens))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the token after the next one to compute is a prompt token whose log-probability was asked for."""
        asked = self.request.params.prompt_logprobs is not None
        return asked and self.num_computed + 1 < self.request.num_prompt_tokens

    def blocks_for_tokens(self, block_tokens: int) -> int:
        """Blocks that hold all the tokens there are, pending ones too."""
        return -(-(len(self.tokens) + self.pending) // block_tokens)

    def append(self, token_id: int) -> None:
        """Adds a generated token."""
        self.tokens.append(token_id)
        if self._history:
            self._history.append(token_id)

    def entry(self, num_tokens: int) -> BatchEntry:
        """The next `num_tokens` tokens as a part of a forward; in the place of a pending one, 0."""
        end = self.num_computed + num_tokens
        wants = "all" if self.wants_prompt_logprobs else "last" if self.remaining == num_tokens else "none"
        token_ids = self.tokens[self.num_computed : end] if end <= len(self.tokens) else (0,) * num_tokens
        return BatchEntry(token_ids, self.num_computed, self.blocks, wants)

    def sample_rows(self, eos_token_ids: Ordered[int]) -> list[SampleRow]:
        """One row for each output that continues these tokens."""
        position = self.position + self.pending
        return [
            SampleRow(self.request.params, position, index, eos_token_ids, self._history, self.pending)
            for index in self.indices
        ]


def _history_of(request: TokenRequest, generated: Ordered[int]) -> TokenHistory | None:
    """Token counts, for the requests whose sampling looks at them."""
    if not request.params.penalized:
        return None
    return TokenHistory((*request.token_ids, *generated), request.num_prompt_tokens)
