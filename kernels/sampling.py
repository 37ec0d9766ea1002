"""The next token of each row: the most probable, or one drawn from what temperature, top-k, top-p and min-p leave.

    e = exp(logit / temperature - the highest);  weight = floor(e * scale), an integer
    top-k keeps the k highest scores and all that equal the k-th; top-p the fewest highest weights that add up to more
    than (1 - p) leaves, of equal ones the lowest ids, at least one; min-p what is at least min_p times the highest
    token = the first whose weights up to and with it exceed floor(uniform * their sum)

logits    [rows, vocab] float32, each row contiguous
how       one for each row
uniforms  one for each row, in [0, 1), a multiple of 2^-53
tokens    one for each row; -1 where the logits define no distribution: a NaN, an infinity, or every token masked

Filters in Hugging Face's order and meaning. Sums of integers below 2^53 are exact, so a row's token is the same alone,
in any batch, on any number of threads and with any instruction set. On CUDA it is the CPU's, and so is every e, bit for
bit: both compute exp by the same fused multiply-adds. (On a CPU without these, e may differ in its last bits, and the
token where the point falls so close to the edge between two.)

The uniform numbers are Philox4x32-10's (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC11):
a number depends on its key and counter alone, so a token's draw can be made again by any worker at any time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton


class How(NamedTuple):
    """How a row's token is found. temperature 0: the highest logit, the lowest id of equal ones."""

    temperature: float
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off


def draw(logits: Tensor, how: Sequence[How], uniforms: Sequence[float], *, kept: Tensor | None = None) -> list[int]:
    """The tokens. kept: [rows, vocab] float32, gets e of the drawn rows, 0 where a filter removed it.

    On CUDA it waits for the device, which a CUDA graph cannot: `draw_tokens` does not. Raises ValueError when an
    argument breaks the contract.
    """
    triton = in_triton("sampling", logits)
    _check_logits(logits)
    rows, vocab = logits.shape
    if len(how) != rows or len(uniforms) != rows:
        raise ValueError(f"{rows} rows need as many of how and uniforms, got {len(how)} and {len(uniforms)}")
    if kept is not None and (kept.dtype != torch.float32 or kept.shape != logits.shape or not kept.is_contiguous()):
        raise ValueError(f"kept must be contiguous float32 [{rows}, {vocab}], got {kept.dtype} {list(kept.shape)}")
    if triton:
        from kernels.cuda.sampling import draw as launch

        settings = torch.tensor(how, dtype=torch.float64, device=logits.device)
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
        launch(logits, settings, points, None, None, None, tokens, kept, _scale(vocab))
        return tokens.tolist()
    # arrays, not tensors: next to no time in a step whose weights have just thrown everything else out of the caches
    settings, points = array("d", chain.from_iterable(how)), array("d", uniforms)
    tokens = array("q", bytes(8 * rows))
    failed = library.call(
        "tandem_sample",
        logits.data_ptr(), logits.stride(0), rows, vocab, _address(settings), _address(points), _scale(vocab),
        _address(tokens), None if kept is None else kept.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"a row of {vocab} logits has no memory to be sampled in")
    return tokens.tolist()


def draw_tokens(
    logits: Tensor, settings: Tensor, seeds: Tensor, indices: Tensor, positions: Tensor, tokens: Tensor
) -> Tensor:
    """draw(logits, how, token_uniforms(seeds, indices, positions)) -> tokens, for a CUDA graph: all is on the device.

    settings            [rows, 4] float64: How
    seeds               [rows] int64: the 64 bits of the unsigned seed
    indices, positions  [rows] int32 or int64
    tokens              [rows] int64, written

    Raises ValueError when a tensor breaks the contract. Values out of their range cannot be seen here: they make some
    token of the vocabulary, or -1.
    """
    if not in_triton("sampling", logits):
        raise ValueError(f"draw_tokens runs on: cuda; got a tensor on {logits.device}, where draw does the same")
    from kernels.cuda.sampling import draw as launch

    _check_logits(logits)
    rows, vocab = logits.shape
    _check_contiguous("settings", settings, [rows, 4], torch.float64)
    _check_contiguous("seeds", seeds, [rows], torch.int64)
    _check_contiguous("indices", indices, [rows], torch.int32, torch.int64)
    _check_contiguous("positions", positions, [rows], torch.int32, torch.int64)
    _check_contiguous("tokens", tokens, [rows], torch.int64)
    launch(logits, settings, None, seeds, indices, positions, tokens, None, _scale(vocab))
    return tokens


def draw_reference(logits: Tensor, how: Sequence[How], uniforms: Sequence[float]) -> list[int]:
    """The same in float64 and by sorting, row by row."""
    rows = zip(logits.double(), how, uniforms, strict=True)
    return [_draw_reference(row, settings, uniform) for row, settings, uniform in rows]


def token_uniforms(seeds: Iterable[int], indices: Iterable[int], positions: Iterable[int]) -> list[float]:
    """One uniform number for each generated token.

    key = the 64-bit seed, counter = (position among the generated tokens, sample index, 0, 0); the last two words are
    left for draws of another kind. The two first output words give the 53 bits, as in the Mersenne Twister's res53.
    """
    key, index, position = array("Q", seeds), array("q", indices), array("q", positions)
    if not len(key) == len(index) == len(position):
        raise ValueError(f"{len(key)} seeds, {len(index)} indices and {len(position)} positions")
    out = array("d", bytes(8 * len(key)))
    library.call("tandem_uniforms", _address(key), _address(index), _address(position), len(key), _address(out))
    return out.tolist()


def fill_uniforms(seeds: Tensor, indices: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """token_uniforms of tensors on CUDA -> out [rows] float64, written. seeds, indices, positions: as of `draw_tokens`.

    Raises ValueError when a tensor breaks the contract.
    """
    if not in_triton("sampling", out):
        raise ValueError(f"fill_uniforms runs on: cuda; got a tensor on {out.device}: token_uniforms does the same")
    from kernels.cuda.sampling import fill_uniforms as launch

    _check_contiguous("out", out, [out.numel()], torch.float64)
    _check_contiguous("seeds", seeds, [len(out)], torch.int64)
    _check_contiguous("indices", indices, [len(out)], torch.int32, torch.int64)
    _check_contiguous("positions", positions, [len(out)], torch.int32, torch.int64)
    launch(seeds, indices, positions, out)
    return out


def token_uniforms_reference(seed: int, index: int, position: int) -> float:
    """The same of one token, in Python's integers."""
    word0, word1, _, _ = philox4x32_reference((position, index, 0, 0), (seed % 2**32, seed >> 32))
    return ((word0 >> 5) * 2**26 + (word1 >> 6)) / 2**53


def philox4x32_reference(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Four 32-bit words from a counter of four and a key of two."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def _check_logits(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be float32 [rows, vocab], got {logits.dtype} {list(logits.shape)}")


def _check_contiguous(name: str, tensor: Tensor, shape: list[int], *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes or list(tensor.shape) != shape or not tensor.is_contiguous():
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} must be contiguous {wanted} {shape}, got {tensor.dtype} {list(tensor.shape)}")


def _address(numbers: array[int] | array[float]) -> int:
    return numbers.buffer_info()[0]


def _scale(vocab: int) -> float:
    """What makes integers of e, which is at most 1: a row of them adds up to less than 2^53."""
    return 2.0 ** min(48, 52 - vocab.bit_length())


def _draw_reference(logits: Tensor, how: How, uniform: float) -> int:
    temperature, top_k, top_p, min_p = how
    if not logits.max().isfinite():  # of a NaN the maximum is NaN
        return -1
    if temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    scores = logits / temperature
    weights = ((scores - scores.max()).exp() * _scale(len(logits))).floor()
    if 0 < top_k < len(logits):
        weights[scores < scores.sort(descending=True).values[top_k - 1]] = 0
    best = weights.sort(descending=True, stable=True)
    if top_p < 1:
        needed = weights.sum() - ((1 - top_p) * weights.sum()).floor()
        removed = best.values.cumsum(0) - best.values >= needed.clamp(min=1)
        weights[best.indices[removed]] = 0
    weights[weights < min_p * best.values[0]] = 0
    cumulative = weights.cumsum(0)
    return int((cumulative > (uniform * cumulative[-1]).floor()).nonzero()[0])
