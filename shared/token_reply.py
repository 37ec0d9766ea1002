"""Sampled tokens as they go to the gateway."""

from __future__ import annotations

from tandem.v1 import types_pb2

from shared.logprobs import TokenLogprobs
from shared.sampling import Sampled

FINISH_REASONS = {
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
    None: types_pb2.FINISH_REASON_UNSPECIFIED,
}


def sampled_logprobs(sampled: Sampled) -> types_pb2.PositionLogprobs | None:
    """None where no log-probability was asked for."""
    if sampled.logprob is None:
        return None
    return position_logprobs(TokenLogprobs(sampled.token_id, sampled.logprob, sampled.top))


def position_logprobs(report: TokenLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(
        chosen=types_pb2.TokenLogprob(token_id=report.token_id, logprob=report.logprob),
        top=[types_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in report.top],
    )
