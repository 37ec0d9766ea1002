"""Dynamic SplitFuse over a ragged engine: each step takes decoding sequences first and fills up with parts of prompts.

    scheduler = SplitFuse(engine, eos_token_ids=(2,))
    uid = scheduler.submit(prompt, SamplingParams(max_tokens=64, seed=0, temperature=0))
    for request in scheduler.run():
        print(request.uid, request.generated)

A step computes one token of every sequence that decodes, as far as it has room in its last block or gets another one,
and then the prompts in the order of their arrival: as many tokens as max_ragged_batch_size leaves, the rest of a long
prompt in the next steps. A prompt begins once the blocks of all its tokens are free, and one for every sequence that
is on its way. Where nothing can be computed, the last request that holds blocks gives them up: to host memory if the
engine may offload, else to be computed again. What a request's tokens are depends on none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from shared.engine.ragged_engine import RaggedEngine
from shared.engine.scheduling_result import SchedulingError, SchedulingResult
from shared.penalties import SampleRow, TokenHistory
from shared.sampling import Sampled, sample_each
from shared.sampling_params import SamplingParams, finish_reason
from shared.sequence_state import SequenceState


@dataclass(eq=False)
class Request:
    """tokens: the prompt's and then its own. finish: stop or length; error: its logits define no distribution."""

    uid: int
    params: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int
    output: list[Sampled] = field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None
    history: TokenHistory | None = None

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def total_tokens(self) -> int:
        """In the cache at most: the last one's keys and values are of no use."""
        return self.num_prompt_tokens + self.params.max_tokens - 1


class SplitFuse:
    """The engine's sequences that others have put are let alone. eos_token_ids: of the model."""

    def __init__(self, engine: RaggedEngine, *, eos_token_ids: Sequence[int] = ()) -> None:
        self._engine, self._eos_token_ids = engine, tuple(eos_token_ids)
        self._requests: dict[int, Request] = {}  # in the order of arrival
        self._uids = count()
        self.given_up = 0  # how often a request gave up its blocks

    def submit(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Takes a request in; the uid of its sequence. Raises ValueError for one that can never be computed."""
        vocab_size = self._engine.plan.architecture.vocab_size
        faults = [f"{fault.field}: {fault.description}" for fault in params.validate(vocab_size)]
        if params.n != 1 or params.stop or params.prompt_logprobs is not None:
            faults.append("n, stop, prompt_logprobs: the service has them; a request here is one output of token ids")
        if not tokens or not all(0 <= token_id < vocab_size for token_id in tokens):
            faults.append(f"tokens: wants one at least, each from 0 to {vocab_size - 1}")
        uid = next(uid for uid in self._uids if self._engine.sequences.get(uid) is None)
        history = TokenHistory(tokens, len(tokens)) if params.penalized else None
        request = Request(uid, params, list(tokens), len(tokens), history=history)
        if faults:
            raise ValueError("; ".join(faults))
        self._check_size(request)
        self._requests[uid] = request
        return uid

    def cancel(self, uid: int) -> None:
        """Forgets a request. Raises KeyError for one that is not there."""
        del self._requests[uid]
        if self._engine.sequences.get(uid) is not None:
            self._engine.flush(uid)

    def hand_over(self, uid: int) -> tuple[Request, SequenceState | None]:
        """Takes a request out, with what the cache holds of it: another engine's `take_over` goes on with it."""
        request, is_tracked = self._requests[uid], self._engine.sequences.get(uid) is not None
        state = self._engine.export_sequence(uid) if is_tracked else None
        self.cancel(uid)
        return request, state

    def take_over(self, request: Request, state: SequenceState | None, *, convert_dtype: bool = False) -> int:
        """Its new uid. Raises what `import_sequence` does; the request can then go elsewhere."""
        self._check_size(request)
        uid = next(uid for uid in self._uids if self._engine.sequences.get(uid) is None)
        if state is not None:
            self._engine.import_sequence(uid, state, convert_dtype=convert_dtype)
        request.uid = uid
        self._requests[uid] = request
        return uid

    def run(self) -> Iterator[Request]:
        """Steps until every request has ended; each as it ends."""
        while self._requests:
            yield from self.step()

    def step(self) -> list[Request]:
        """Computes a batch; the requests that ended with it."""
        parts = self._plan()
        if not parts:
            if self._requests:
                self._give_up()
            return []
        uids, tokens = [], []
        for request, num_tokens in parts:
            begin = self._seen(request)
            uids.append(request.uid)
            tokens.append(request.tokens[begin : begin + num_tokens])
        logits = self._engine.put(uids, tokens)
        computed = [row for row, (request, _) in enumerate(parts) if self._remaining(request) == 0]
        requests = [parts[row][0] for row in computed]
        rows = [
            SampleRow(r.params, len(r.generated), eos_token_ids=self._eos_token_ids, history=r.history)
            for r in requests
        ]
        for request, sampled in zip(requests, sample_each(logits[computed], rows), strict=True):
            self._accept(request, sampled)
        ended = [request for request in requests if request.finish or request.error]
        for request in ended:
            self.cancel(request.uid)
        return ended

    def _accept(self, request: Request, sampled: Sampled | Exception) -> None:
        if isinstance(sampled, Exception):
            request.error = sampled
            return
        request.tokens.append(sampled.token_id)
        request.output.append(sampled)
        if request.history:
            request.history.append(sampled.token_id)
        num_output = len(request.generated)
        request.finish = finish_reason(request.params, sampled.token_id, num_output, self._eos_token_ids)

    def _plan(self) -> list[tuple[Request, int]]:
        """Who takes part in the next batch, and with how many tokens. Offloaded ones whose turn it is come back."""
        engine, limits = self._engine, self._engine.config.state_manager
        here = {uid: request for uid, request in self._requests.items() if self._is_here(request)}
        parts: list[tuple[Request, int]] = []
        budget, free = limits.max_ragged_batch_size, engine.free_blocks
        for request in here.values():
            missing = engine.sequences.blocks_missing(request.uid, 1)
            if self._remaining(request) == 1 and missing <= free and len(parts) < limits.max_ragged_sequence_count:
                parts.append((request, 1))
                budget, free = budget - 1, free - missing
        for request in self._requests.values():
            is_here = request.uid in here
            if is_here and self._remaining(request) == 1:
                continue
            if not budget or len(parts) == limits.max_ragged_sequence_count:
                break
            missing = engine.sequences.blocks_missing(request.uid, self._remaining(request))
            if missing + (0 if is_here else len(here)) > free:
                break  # nobody passes the first in line
            if not is_here:
                if engine.sequences.get(request.uid) is None:
                    if len(engine.sequences) + self._num_new(parts) >= limits.max_tracked_sequences:
                        break
                else:
                    engine.restore(request.uid)
                here[request.uid] = request
            num_tokens = min(self._remaining(request), budget)
            parts.append((request, num_tokens))
            budget, free = budget - num_tokens, free - missing
        return parts

    def _give_up(self) -> None:
        """The last request that holds blocks lets others have them."""
        holding = [request for request in self._requests.values() if self._is_here(request)]
        if not holding:
            # sequences that others have put hold the blocks, or the slots
            is_full = len(self._engine.sequences) >= self._engine.config.state_manager.max_tracked_sequences
            result = SchedulingResult.EngineSequenceLimitExceeded if is_full else SchedulingResult.KVCacheLimitExceeded
            raise SchedulingError(result)
        if self._engine.config.state_manager.offload:
            self._engine.offload(holding[-1].uid)
        else:
            self._engine.flush(holding[-1].uid)
        self.given_up += 1

    def _is_here(self, request: Request) -> bool:
        """Whether it holds blocks."""
        sequence = self._engine.sequences.get(request.uid)
        return sequence is not None and not sequence.is_offloaded

    def _num_new(self, parts: list[tuple[Request, int]]) -> int:
        return sum(self._engine.sequences.get(request.uid) is None for request, _ in parts)

    def _seen(self, request: Request) -> int:
        sequence = self._engine.sequences.get(request.uid)
        return 0 if sequence is None else sequence.seen_tokens

    def _remaining(self, request: Request) -> int:
        """Tokens that are still to compute; 1 in a decode step."""
        return len(request.tokens) - self._seen(request)

    def _check_size(self, request: Request) -> None:
        plan, blocks = self._engine.plan, self._engine.num_blocks
        needed = -(-request.total_tokens // plan.layout.block_tokens)
        if request.total_tokens + 1 > plan.max_context or needed > blocks:
            raise ValueError(
                f"max_tokens: {request.num_prompt_tokens} tokens and {request.params.max_tokens} more are over "
                f"max_context ({plan.max_context}), or over the {blocks} blocks of {plan.layout.block_tokens}"
            )
