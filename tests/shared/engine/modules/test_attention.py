"""Self attention against float64: every mask and every kind of positions, in prompts, chunks and decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, RaggedBatch, build_batch
from shared.config import KvCacheConfig
from shared.config.modules import RotateHalfConfig, SelfAttentionConfig
from shared.engine.modules import KvGroups, SelfAttention
from shared.policies.positions import alibi_slopes, mpt_slopes
from tests.shared.engine.modules.references import TOLERANCE, rounded

BLOCK_TOKENS = 8
SCALE = 0.3
# tokens that are computed at once, of a sequence: up to a block's end, over it, one by one
CHUNKS = (8, 7, 1, 1, 13)


def config(heads: int, kv_heads: int, head_size: int, dtype: str = "float32", **more: Any) -> SelfAttentionConfig:
    return SelfAttentionConfig(
        **{
            "max_tokens": 64,
            "n_heads_q": heads,
            "n_heads_kv": kv_heads,
            "head_size": head_size,
            "max_sequences": 2,
            "scale_factor": SCALE,
            "input_dtype": dtype,
            "output_dtype": dtype,
            **more,
        }
    )


def turned(x: Tensor, frequencies: Tensor, pairs: str) -> Tensor:
    """x [tokens, heads, head_size] float64, token by token from position 0."""
    width = 2 * len(frequencies)
    angles = (torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies.double())[:, None]
    cos, sin, rotated = angles.cos(), angles.sin(), x[..., :width]
    if pairs == "rotate_half":
        one, two = rotated.chunk(2, -1)
        result = torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
    else:
        one, two = rotated[..., ::2], rotated[..., 1::2]
        result = torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)
    return torch.cat((result, x[..., width:]), -1)


def reference(
    config: SelfAttentionConfig, qkv: Tensor, frequencies: Tensor | None, slopes: Tensor | None, seen: list[int]
) -> Tensor:
    """Of one sequence: qkv [tokens, ...] float64 -> [tokens, heads * head_size]. seen: the tokens that are in the cache
    when each is computed, which is what it attends to without a mask."""
    tokens, groups = len(qkv), config.n_heads_q // config.n_heads_kv
    heads = qkv.view(tokens, -1, config.head_size)
    q, k, v = heads.split([config.n_heads_q, config.n_heads_kv, config.n_heads_kv], 1)
    if frequencies is not None:
        q, k = (turned(x, frequencies, config.positional_embedding_type) for x in (q, k))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * config.scale_factor
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    hidden = distance < 0
    if config.masking_type == "none":
        hidden = torch.arange(tokens) >= torch.tensor(seen)[:, None]
    if window := config.masking_args.get("window"):
        hidden = hidden | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def batches() -> list[tuple[RaggedBatch, list[tuple[int, int]]]]:
    """Two sequences of 30 tokens side by side, the second a chunk behind; with the tokens of each in a batch."""
    tables, starts = ([4, 1, 7, 2], [3, 9, 5, 8]), [0, 0]
    made: list[tuple[RaggedBatch, list[tuple[int, int]]]] = []
    for step in range(len(CHUNKS) + 1):
        entries, spans = list[BatchEntry](), list[tuple[int, int]]()
        for sequence in range(2):
            chunk = step - sequence
            count = CHUNKS[chunk] if 0 <= chunk < len(CHUNKS) else 0
            spans.append((starts[sequence], starts[sequence] + count))
            if count:
                entries.append(BatchEntry([0] * count, starts[sequence], tables[sequence]))
            starts[sequence] += count
        made.append((build_batch(entries, BLOCK_TOKENS), spans))
    return made


def check(
    module: SelfAttention,
    dtype: str,
    frequencies: Tensor | None = None,
    slopes: Tensor | None = None,
    inv_freqs: Tensor | None = None,
) -> None:
    """Two sequences in steps, against the reference of each."""
    config = module.config
    shape = (2, config.n_heads_kv, config.head_size)
    kv = KvGroups(KvCacheConfig.of(cache_shape=shape, block_size=BLOCK_TOKENS, cache_dtype=dtype), 10)
    width = (config.n_heads_q + 2 * config.n_heads_kv) * config.head_size
    sequences = [rounded((sum(CHUNKS), width), dtype) for _ in range(2)]
    got: list[list[Tensor]] = [[], []]
    for batch, spans in batches():
        qkv = torch.cat([rows[begin:end] for rows, (begin, end) in zip(sequences, spans, strict=True)])
        out = module(qkv, kv.layer(1), batch, inv_freqs).clone()
        for sequence, part in enumerate(out.split([end - begin for begin, end in spans])):
            got[sequence].append(part)
    seen = [sum(CHUNKS[: index + 1]) for index, count in enumerate(CHUNKS) for _ in range(count)]
    for rows, parts in zip(sequences, got, strict=True):
        wanted = reference(config, rows.double(), frequencies, slopes, seen)
        # scores are of rounded queries and keys
        torch.testing.assert_close(
            torch.cat(parts).double(), wanted, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
        )


HEADS = pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(3, 3, 8), (8, 2, 40), (6, 1, 24)])


@pytest.mark.parametrize("dtype", DTYPES)
@HEADS
@pytest.mark.parametrize(
    "mask",
    [{}, {"masking_type": "local", "masking_args": {"window": 5}}, {"masking_type": "none"}],
    ids=["causal", "local", "none"],
)
def test_masks(mask: dict[str, Any], heads: int, kv_heads: int, head_size: int, dtype: str) -> None:
    torch.manual_seed(heads)
    check(SelfAttention(config(heads, kv_heads, head_size, dtype, **mask)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rotate_half", "rotate_every_other"])
@pytest.mark.parametrize(("head_size", "rotate_dim", "theta"), [(8, None, 1e4), (40, 40, 500.0), (24, 10, 1e6)])
def test_rotary_positions_of_some_dimensions_or_all(
    kind: str, head_size: int, rotate_dim: int | None, theta: float, dtype: str
) -> None:
    torch.manual_seed(head_size)
    rotary = RotateHalfConfig(theta_base=theta, rotate_dim=rotate_dim)
    made = config(
        4,
        2,
        head_size,
        dtype,
        positional_embedding_type=kind,
        positional_embedding_config=rotary,
    )
    width = rotate_dim or head_size
    check(SelfAttention(made), dtype, theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))


@pytest.mark.parametrize("kind", ["rotate_half", "rotate_every_other"])
def test_rotary_positions_without_a_config_are_those_of_its_defaults(kind: str) -> None:
    frequencies = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    check(SelfAttention(config(4, 2, 16, positional_embedding_type=kind)), "float32", frequencies)


def test_trained_frequencies_come_with_the_call() -> None:
    rotary = RotateHalfConfig(use_trained_freqs=True, rotate_dim=12)
    made = config(4, 2, 16, positional_embedding_type="rotate_half", positional_embedding_config=rotary)
    module = SelfAttention(made)
    for seed in (0, 1):  # of two layers
        torch.manual_seed(seed)
        frequencies = torch.rand(6)
        check(module, "float32", frequencies, inv_freqs=frequencies)
    batch = build_batch([BatchEntry([0], 0, [1])], BLOCK_TOKENS)
    kv = KvGroups(KvCacheConfig(cache_shape=(1, 2, 16), block_size=BLOCK_TOKENS, cache_dtype="float32"), 4)
    qkv = torch.ones(1, 8 * 16)
    with pytest.raises(ValueError, match="inv_freqs: are missing"):
        module(qkv, kv.layer(0), batch)
    with pytest.raises(ValueError, match=r"inv_freqs: must be one for each of 6 pairs, got \[8\]"):
        module(qkv, kv.layer(0), batch, torch.rand(8))
    with pytest.raises(ValueError, match="inv_freqs: are given"):
        SelfAttention(config(4, 2, 16))(qkv, kv.layer(0), batch, frequencies)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 4])
def test_alibi(window: int | None, dtype: str) -> None:
    torch.manual_seed(0)
    mask = {"masking_type": "local", "masking_args": {"window": window}} if window else {}
    made = config(6, 2, 16, dtype, positional_embedding_type="alibi", **mask)
    check(SelfAttention(made), dtype, slopes=torch.tensor(alibi_slopes(6)))
    slopes = mpt_slopes(6, 8.0)
    check(SelfAttention(made, alibi_slopes=slopes), dtype, slopes=torch.tensor(slopes))


def test_a_quantized_cache_is_read_with_its_scales() -> None:
    made = config(4, 2, 16, "bfloat16", scale_factor=0.2)
    batch = build_batch([BatchEntry([0] * 20, 0, [1, 2, 3])], BLOCK_TOKENS)
    qkv = rounded((20, 8 * 16), "bfloat16")
    answers = {}
    for dtype in ("bfloat16", "int8", "fp8"):
        kv = KvGroups(KvCacheConfig.of(cache_shape=(1, 2, 16), block_size=BLOCK_TOKENS, cache_dtype=dtype), 4)
        answers[dtype] = SelfAttention(made)(qkv, kv.layer(0), batch)
    for dtype in ("int8", "fp8"):
        assert not torch.equal(answers[dtype], answers["bfloat16"])
        torch.testing.assert_close(answers[dtype], answers["bfloat16"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("heads", "more", "message"),
    [
        ((4, 3, 8), {}, "n_heads_kv: 3 does not divide 4 heads of queries"),
        ((4, 2, 12), {}, "head_size: 12 is not a multiple of 8 up to 512"),
        ((4, 2, 520), {}, "head_size: 520 is not"),
        ((4, 2, 8), {"masking_type": "symmetric"}, "masking_type: symmetric is a tensor that no op reads"),
        ((4, 2, 8), {"masking_type": "asymmetric"}, "masking_type: asymmetric is a tensor that no op reads"),
        ((4, 2, 8), {"masking_type": "local"}, r"masking_args: {}, and masking_type local wants {'window': 1 or more"),
        ((4, 2, 8), {"masking_type": "local", "masking_args": {"window": 0}}, "masking_args: {'window': 0}"),
        ((4, 2, 8), {"masking_args": {"window": 4}}, "masking_args: .*, and masking_type causal wants nothing"),
        (
            (4, 2, 8),
            {"masking_type": "none", "positional_embedding_type": "alibi"},
            "positional_embedding_type: alibi asks for a position",
        ),
        (
            (4, 2, 8),
            {"positional_embedding_config": RotateHalfConfig()},
            "positional_embedding_config: is given, and the type is none; leave it out",
        ),
        *(
            (
                (4, 2, 8),
                {
                    "positional_embedding_type": "rotate_half",
                    "positional_embedding_config": RotateHalfConfig(rotate_dim=dim),
                },
                f"positional_embedding_config.rotate_dim: {dim} is odd or above 8",
            )
            for dim in (3, 10)
        ),
        ((4, 2, 8), {"output_dtype": "float16"}, "output_dtype: float16, and input_dtype is float32"),
    ],
)
def test_what_no_op_computes_is_refused(heads: tuple[int, int, int], more: dict[str, Any], message: str) -> None:
    made = config(*heads, **more)
    assert not SelfAttention.supports_config(made)
    with pytest.raises(ValueError, match=message):
        SelfAttention(made)


def test_calls_that_do_not_fit_the_config_are_refused() -> None:
    module = SelfAttention(config(4, 2, 8))
    kv = KvGroups(KvCacheConfig(cache_shape=(1, 2, 8), block_size=BLOCK_TOKENS, cache_dtype="float32"), 4)
    three = build_batch([BatchEntry([0], 0, [block]) for block in (1, 2, 3)], BLOCK_TOKENS)
    with pytest.raises(ValueError, match="max_sequences: 3 sequences, and the module was made for 2"):
        module(torch.ones(3, 64), kv.layer(0), three)
    with pytest.raises(ValueError, match=r"q_k_v: is torch\.float16, and the config's input_dtype is float32"):
        module(torch.ones(3, 64, dtype=torch.float16), kv.layer(0), three)
    for slopes, positions in (((0.5,), "alibi"), ((0.5,) * 4, "none")):
        with pytest.raises(ValueError, match=r"alibi_slopes: \d are given"):
            SelfAttention(config(4, 2, 8, positional_embedding_type=positions), alibi_slopes=slopes)
