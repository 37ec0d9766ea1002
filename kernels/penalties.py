"""What the tokens that a sequence holds do to its logits, in place, with their counts on the device.

    x = x / repetition where x >= 0, else x * repetition     of each token in the prompt or generated
    x = x - frequency * count - presence * [count > 0]        count: how often it was generated

The order of operations, and so the bits, of shared/penalties.py, which does this on a CPU from lists of tokens.

logits    [rows, vocab] float32, each row contiguous
counts    [slots, vocab] int32: a running sequence's tokens; IN_PROMPT is set where the prompt holds one, and the bits
          below it count how often it was generated
slots     [rows] int32 or int64: which of the counts is a row's, no two alike; the row is left alone where it is none
settings  [rows, 3] float32: repetition, frequency, presence; 1, 0, 0 leaves the row alone
tokens    [rows] int64; one out of the vocabulary, as -1, is not counted

For CUDA alone: nothing here looks at a value on the host, so that all of it can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.device import in_triton

IN_PROMPT = 1 << 30


def edit_tokens(logits: Tensor, slots: Tensor, counts: Tensor, settings: Tensor) -> Tensor:
    """The penalties of each row -> logits, changed in place. Raises ValueError when a tensor breaks the contract."""
    _check_device("edit_tokens", logits)
    if logits.dtype != torch.float32 or logits.dim() != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be float32 [rows, vocab], got {logits.dtype} {list(logits.shape)}")
    rows, vocab = logits.shape
    _check_counts(counts)
    if counts.shape[1] != vocab:
        raise ValueError(f"counts must be of the {vocab} tokens that logits has, got {list(counts.shape)}")
    _check_slots(slots, rows)
    if settings.dtype != torch.float32 or list(settings.shape) != [rows, 3] or not settings.is_contiguous():
        raise ValueError(
            f"settings must be contiguous float32 [{rows}, 3], got {settings.dtype} {list(settings.shape)}"
        )
    from kernels.cuda.penalties import edit_tokens as launch

    launch(logits, slots, counts, settings)
    return logits


def count_tokens(counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """One more of each row's token -> counts, changed in place. Raises ValueError when a tensor breaks the contract."""
    _check_device("count_tokens", counts)
    _check_counts(counts)
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous():
        raise ValueError(f"tokens must be contiguous int64 [rows], got {tokens.dtype} {list(tokens.shape)}")
    _check_slots(slots, len(tokens))
    from kernels.cuda.penalties import count_tokens as launch

    launch(counts, slots, tokens)
    return counts


def counts_of(tokens: Sequence[int], num_prompt: int, vocab: int) -> Tensor:
    """A sequence's counts [vocab] int32, on the CPU. tokens: prompt, then generated.

    Ids beyond the vocabulary are left out: a prompt may hold one that the model embeds and never predicts.
    """
    ids = torch.tensor(tokens, dtype=torch.int64)
    prompt, generated = (part[part < vocab] for part in (ids[:num_prompt], ids[num_prompt:]))
    counts = torch.bincount(generated, minlength=vocab).int()
    counts[prompt] += IN_PROMPT  # of a token that is there twice it is added once
    return counts


def edit_tokens_reference(logits: Tensor, slots: Tensor, counts: Tensor, settings: Tensor) -> Tensor:
    """The same in plain torch -> a copy, in the dtype of the logits."""
    known = (slots >= 0) & (slots < len(counts))
    words = torch.where(known[:, None], counts[slots.clamp(0, len(counts) - 1)], 0)
    count = words & (IN_PROMPT - 1)
    repetition, frequency, presence = settings.to(logits.dtype)[:, :, None].unbind(1)
    scores = torch.where(logits < 0, logits * repetition, logits / repetition)
    scores = scores - frequency * count
    return torch.where(words != 0, scores - presence * (count > 0), logits)


def count_tokens_reference(counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """The same in plain torch -> a copy."""
    counts = counts.clone()
    known = (slots >= 0) & (slots < len(counts)) & (tokens >= 0) & (tokens < counts.shape[1])
    counts[slots[known], tokens[known]] += 1
    return counts


def _check_device(op: str, tensor: Tensor) -> None:
    if not in_triton("penalties", tensor):
        raise ValueError(f"{op} runs on: cuda; got a tensor on {tensor.device}, for which there is shared/penalties.py")


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != torch.int32 or counts.dim() != 2 or not counts.is_contiguous():
        raise ValueError(f"counts must be contiguous int32 [slots, vocab], got {counts.dtype} {list(counts.shape)}")


def _check_slots(slots: Tensor, rows: int) -> None:
    if slots.dtype not in (torch.int32, torch.int64) or list(slots.shape) != [rows] or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous int32 or int64 [{rows}], got {slots.dtype} {list(slots.shape)}")
