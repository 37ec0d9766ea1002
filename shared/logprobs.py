"""Log probabilities as reported to clients: log_softmax, in float32, of the model's own logits.

Before bias, penalties, temperature and filters (vLLM's `raw_logprobs`; the log_softmax of Hugging Face's
`output_logits`): they say what the model thought, and do not depend on how a token was then drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Logits worked on at once: temporaries this small stay in the cache and in the allocator's hands, where those of a
# whole step would be mapped and faulted in anew at each operation (6 times slower on a CPU).
CHUNK_ELEMENTS = 2**18


class TokenLogprobs(NamedTuple):
    """The log probability of a token, and the best tokens of its row in falling order, the lowest id first on ties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class InvalidLogits(ValueError):
    """Rows that define no distribution (NaN, an infinity, or every token masked); the other rows are not at fault."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"the logits of rows {list(rows)} define no distribution")
        self.rows = tuple(rows)


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
    """The log probability of each prompt token given those before it, with the k best of each row.

    logits: [n, vocab] float32, row i predicts targets[i]; targets: [n] int64. Raises InvalidLogits.
    """
    return token_logprobs(logits, targets, [k] * len(targets))


def token_logprobs(logits: Tensor, targets: Tensor, ks: Sequence[int]) -> list[TokenLogprobs]:
    """As prompt_logprobs, with its own number of best tokens for each row. Each row's bits are its own."""
    reports: list[TokenLogprobs] = []
    step = chunk_rows(logits.shape[1])
    for start in range(0, len(ks), step):
        chunk = slice(start, start + step)
        reports += _chunk_logprobs(logits[chunk], targets[chunk], ks[chunk], start)
    return reports


def chunk_rows(vocab_size: int) -> int:
    """How many rows to work on at once."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def _chunk_logprobs(logits: Tensor, targets: Tensor, ks: Sequence[int], start: int) -> list[TokenLogprobs]:
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    invalid = chosen.isnan().nonzero().flatten().tolist()
    if invalid:
        raise InvalidLogits([start + row for row in invalid])
    tops: list[list[tuple[float, int, float]]] = [[] for _ in ks]
    size = min(max(ks), logits.shape[1])
    if size > 0:
        # Of equal logits topk keeps any, and log_softmax may round two logits to one value. So topk only finds the
        # k-th logit; every token that reaches it is then sorted by (logit, id).
        best = logits.topk(size).values
        wanted = torch.tensor(ks, device=logits.device)
        kth = best.gather(1, (wanted[:, None] - 1).clamp(0, size - 1)).masked_fill(wanted[:, None] == 0, torch.inf)
        row_ids, token_ids = (logits >= kth).nonzero(as_tuple=True)
        columns = (row_ids, token_ids, logits[row_ids, token_ids], logprobs[row_ids, token_ids])
        for row, token_id, logit, logprob in zip(*(column.tolist() for column in columns), strict=True):
            tops[row].append((-logit, token_id, logprob))
    return [
        TokenLogprobs(token_id, logprob, tuple((i, value) for _, i, value in sorted(top)[:k]))
        for token_id, logprob, top, k in zip(targets.tolist(), chosen.tolist(), tops, ks, strict=True)
    ]
