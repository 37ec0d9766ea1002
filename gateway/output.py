"""One of a request's outputs as it grows: its tokens, each exactly once, and the text that each token made certain."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.v1 import inference_pb2, types_pb2

from gateway.stop_strings import StopMatcher
from shared.tokenizer import Tokenizer


class GapError(Exception):
    """Tokens arrived whose predecessors are missing: the worker broke the contract."""


class Output:
    """Tokens with their text increments and logprobs.

    `texts[i]` is the text that token `first_kept + i` made certain, so that the text of any run of tokens is theirs
    joined. `forget(position)` drops texts and logprobs of delivered tokens; token ids stay, a recovery needs them.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str], min_tokens: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[types_pb2.PositionLogprobs] = []
        self.first_kept = 0
        self.finish_reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
        self.stop_match: str | None = None
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(stops)
        self._min_tokens = min_tokens

    @property
    def done(self) -> bool:
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    def accept(
        self,
        position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[types_pb2.PositionLogprobs],
        finish_reason: types_pb2.FinishReason.ValueType,
    ) -> int:
        """Takes tokens from a worker and returns how many of them are new.

        position: of the first of them. Tokens that are here already, or that follow a stop string, are passed over.
        Raises GapError if tokens before `position` are missing.
        """
        if self.done:
            return 0
        before = len(self.token_ids)
        known = before - position
        if known < 0:
            raise GapError(f"output {self.index} is at token {len(self.token_ids)}, and got one for {position}")
        for i in range(known, len(token_ids)):
            ends = i == len(token_ids) - 1 and finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED
            self._append(
                token_ids[i],
                logprobs[i] if logprobs else None,
                finish_reason if ends else types_pb2.FINISH_REASON_UNSPECIFIED,
            )
            if self.done:
                break
        return len(self.token_ids) - before

    def _append(
        self,
        token_id: int,
        logprobs: types_pb2.PositionLogprobs | None,
        finish_reason: types_pb2.FinishReason.ValueType,
    ) -> None:
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.name_tokens(logprobs)
            self.logprobs.append(logprobs)
        # a token that ends the output by its id is no part of the text
        text = "" if finish_reason == types_pb2.FINISH_REASON_STOP else self._detokenizer.push(token_id)
        if finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED:
            text += self._detokenizer.finish()
        text, self.stop_match = self._stops.push(text, may_stop=len(self.token_ids) >= self._min_tokens)
        if self.stop_match is not None:
            finish_reason = types_pb2.FINISH_REASON_STOP
        elif finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED:
            text += self._stops.finish()
        self.texts.append(text)
        self.finish_reason = finish_reason

    def chunk(self, position: int, max_tokens: int) -> inference_pb2.Output:
        """Up to so many tokens from a position on. Raises IndexError if the text there was forgotten."""
        if position < self.first_kept:
            raise IndexError(f"output {self.index} is kept from position {self.first_kept}, not {position}")
        start, end = position - self.first_kept, position - self.first_kept + max_tokens
        chunk = inference_pb2.Output(
            index=self.index,
            position=position,
            token_ids=self.token_ids[position : position + max_tokens],
            text="".join(self.texts[start:end]),
            logprobs=self.logprobs[start:end],
        )
        if end >= len(self.texts):
            chunk.finish_reason = self.finish_reason
            chunk.stop_match = self.stop_match or ""
        return chunk

    def name_tokens(self, logprobs: types_pb2.PositionLogprobs) -> None:
        """Gives each token its own text."""
        for token in (logprobs.chosen, *logprobs.top):
            token.text = self._tokenizer.token_text(token.token_id)

    def forget(self, position: int) -> None:
        """Drops text and logprobs of the tokens before a position."""
        count = position - self.first_kept
        if count > 0:
            del self.texts[:count]
            del self.logprobs[:count]
            self.first_kept = position
