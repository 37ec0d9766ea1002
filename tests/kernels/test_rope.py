"""Rope, cache write and q/k norm against their float64 reference, and the same bits for a token among any others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import device
from kernels.kv_format import GREATEST, KvFormat, KvPlanes, quantize_rows
from kernels.rope import rope_and_cache, rope_and_cache_reference

BLOCK_TOKENS, BLOCKS = 16, 40
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


def make_cos_sin(rotary: int, positions: int = 512) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def make_cache(kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> KvPlanes:
    pool = torch.full((BLOCKS, 2, 2, kv_heads, BLOCK_TOKENS, head_dim), torch.nan, dtype=dtype, device=device)
    return KvPlanes(pool[:, 1, 0], pool[:, 1, 1])


def tensors(cache: KvPlanes) -> list[Tensor]:
    return [cache.keys, cache.values]


@DTYPES
@pytest.mark.parametrize(
    ("interleaved", "norm_dtype"),
    [(False, "none"), (False, "own"), (True, "none"), (True, "own"), (True, "float32")],
)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary"),
    [
        (1, 9, 3, 64, 64),
        (37, 4, 4, 8, 8),
        (5, 8, 1, 80, 32),
        (130, 16, 2, 128, 128),
        (3, 2, 1, 24, 6),
        (2, 2, 5, 40, 26),
        (2, 3, 1, 256, 256),
        (3, 4, 2, 40, 0),
    ],
)
def test_matches_the_reference(
    on: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    norm_dtype: str,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    if device.INTERPRETED:  # milliseconds for each program
        tokens = min(tokens, 3)
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(on, dtype)
    cos_sin = make_cos_sin(rotary).to(on)
    positions = torch.randint(0, 512, (tokens,), dtype=torch.int32).to(on)
    slots = torch.randperm(BLOCKS * BLOCK_TOKENS)[:tokens].to(on)
    q_norm, k_norm, wide_q_norm, wide_k_norm = None, None, None, None
    if norm_dtype != "none":
        q_norm, k_norm = torch.randn(2, head_dim).to(on, dtype).to(dtype if norm_dtype == "own" else torch.float32)
        wide_q_norm, wide_k_norm = q_norm.double(), k_norm.double()
    cache = make_cache(kv_heads, head_dim, dtype, on)
    out = torch.full((tokens, heads, head_dim), torch.nan, dtype=dtype, device=on)
    q = rope_and_cache(
        qkv, cos_sin, positions, slots, cache, heads, kv_heads, q_norm, k_norm, 1e-6,
        interleaved=interleaved, out=out,
    )  # fmt: skip
    assert q is out

    wide = make_cache(kv_heads, head_dim, torch.float64, on)
    expected = rope_and_cache_reference(
        qkv.double(), cos_sin.double(), positions, slots, wide, heads, kv_heads, wide_q_norm, wide_k_norm, 1e-6,
        interleaved=interleaved,
    )  # fmt: skip
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(q.double(), expected, atol=tolerance, rtol=tolerance)
    # equal_nan: every other slot still holds its poison
    torch.testing.assert_close(cache.keys.double(), wide.keys, atol=tolerance, rtol=tolerance, equal_nan=True)
    torch.testing.assert_close(cache.values.double(), wide.values, atol=0, rtol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("form", GREATEST)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "interleaved", "normed"),
    [
        (9, 3, 64, 64, False, False),
        (4, 5, 40, 26, True, True),
        (2, 1, 24, 6, False, True),
        (4, 2, 128, 128, False, True),
        (3, 1, 80, 0, False, False),
    ],
)
def test_a_quantized_cache_has_what_a_plain_one_would_have_quantized(
    on: str, heads: int, kv_heads: int, head_dim: int, rotary: int, interleaved: bool, normed: bool, form: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    tokens = 3 if device.INTERPRETED else 70
    qkv = (torch.randn(tokens, heads + 2 * kv_heads, head_dim) * torch.logspace(-3, 3, head_dim)).to(dtype)
    qkv[0, heads:] = 0
    qkv[1, -1] = 2.0**-101
    qkv[2, -1, 1:] *= 2.0**-20  # elements that round to 0, or that e4m3 has no exponent for
    positions = torch.randint(0, 512, (tokens,), dtype=torch.int32)
    slots = torch.randperm(BLOCKS * BLOCK_TOKENS)[:tokens]
    norms = tuple(torch.randn(2, head_dim).to(dtype).to(on)) if normed else (None, None)
    arguments = qkv.flatten(1).to(on), make_cos_sin(rotary).to(on), positions.to(on), slots.to(on)
    plain = make_cache(kv_heads, head_dim, dtype, on)
    q = rope_and_cache(*arguments, plain, heads, kv_heads, *norms, interleaved=interleaved)
    layout = KvFormat(form, 2, kv_heads, head_dim, BLOCK_TOKENS)
    pools = [torch.full((BLOCKS, layout.block_bytes), 0xFF, dtype=torch.uint8) for _ in "ab"]
    found = pools[0].to(on)
    cache = layout.planes(found, 1)
    assert torch.equal(rope_and_cache(*arguments, cache, heads, kv_heads, *norms, interleaved=interleaved), q)
    expected = layout.planes(pools[1], 1)
    blocks, offsets = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
    for rows, elements, scales in (
        (plain.keys, expected.keys, expected.key_scales),
        (plain.values, expected.values, expected.value_scales),
    ):
        assert scales is not None
        made = quantize_rows(rows.cpu()[blocks, :, offsets], form)
        elements[blocks, :, offsets], scales[blocks, :, offsets] = made
    assert torch.equal(found.cpu(), pools[1])


def test_the_reference_quantizes_too() -> None:
    qkv, cos_sin = torch.randn(3, 4 * 16), make_cos_sin(16)
    positions, slots = torch.arange(3, dtype=torch.int32), torch.tensor([16, 40, 90])
    plain = make_cache(1, 16, torch.float32)
    layout = KvFormat("int8", 2, 1, 16, BLOCK_TOKENS)
    cache = layout.planes(torch.zeros(BLOCKS, layout.block_bytes, dtype=torch.uint8), 0)
    for to in (plain, cache):
        rope_and_cache_reference(qkv, cos_sin, positions, slots, to, 2, 1)
    written = (slots // BLOCK_TOKENS, slice(None), slots % BLOCK_TOKENS)
    widened = cache.widened()
    torch.testing.assert_close(widened.keys[written], plain.keys[written], atol=0.02, rtol=0)
    torch.testing.assert_close(widened.values[written], plain.values[written], atol=0.02, rtol=0)


def test_scales_may_have_strides_of_their_own(on: str) -> None:
    torch.manual_seed(1)
    elements = [torch.zeros(6, 3, 4, 16, dtype=torch.int8, device=on) for _ in range(4)]
    scales = torch.zeros(6, 3, 4, device=on), torch.zeros(6, 3, 4, device=on)
    apart = torch.zeros(4, 3, 6, device=on).transpose(0, 2), torch.zeros(6, 3, 4, 2, device=on)[..., 1]
    qkv, cos_sin = torch.randn(5, 11 * 16).to(on), make_cos_sin(16).to(on)
    positions, slots = torch.arange(5, dtype=torch.int32).to(on), torch.tensor([23, 4, 5, 0, 13]).to(on)
    for cache in (KvPlanes(*elements[:2], *scales, "int8"), KvPlanes(*elements[2:], *apart, "int8")):
        rope_and_cache(qkv, cos_sin, positions, slots, cache, 5, 3)
    assert torch.equal(elements[2], elements[0])
    assert all(torch.equal(found, expected) for found, expected in zip(apart, scales, strict=True))
    assert scales[0].count_nonzero() == scales[1].count_nonzero() == 15


def test_interleaved_is_rotate_half_of_reordered_dimensions(on: str) -> None:
    head_dim, rotary = 24, 12
    order = torch.cat([torch.arange(0, rotary, 2), torch.arange(1, rotary, 2), torch.arange(rotary, head_dim)])
    qkv, cos_sin = torch.randn(3, 3, head_dim).to(on), make_cos_sin(rotary).to(on)
    positions, slots = torch.tensor([5, 0, 99], dtype=torch.int32).to(on), torch.tensor([16, 17, 90]).to(on)
    cache, reordered = make_cache(1, head_dim, torch.float32, on), make_cache(1, head_dim, torch.float32, on)
    q = rope_and_cache(qkv.flatten(1), cos_sin, positions, slots, cache, 1, 1, interleaved=True)
    halves = rope_and_cache(qkv[..., order].flatten(1), cos_sin, positions, slots, reordered, 1, 1)
    assert torch.equal(q[..., order], halves)
    assert torch.equal(cache.keys[..., order].nan_to_num(), reordered.keys.nan_to_num())


@DTYPES
def test_without_rotation_q_k_and_v_are_copied(on: str, dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 5, 40).to(on, dtype)
    cos_sin = torch.empty(64, 0, device=on)
    positions, slots = torch.tensor([5, 0, 63], dtype=torch.int32).to(on), torch.tensor([16, 17, 90]).to(on)
    cache = make_cache(1, 40, dtype, on)
    q = rope_and_cache(qkv.flatten(1), cos_sin, positions, slots, cache, 3, 1)
    assert torch.equal(q, qkv[:, :3])
    written = (slots // BLOCK_TOKENS, slice(None), slots % BLOCK_TOKENS)
    assert torch.equal(cache.keys[written], qkv[:, 3:4])
    assert torch.equal(cache.values[written], qkv[:, 4:])
    assert cache.keys.isfinite().sum() == cache.values.isfinite().sum() == 3 * 40


def test_caches_may_have_strides_of_their_own(on: str) -> None:
    torch.manual_seed(1)
    # tokens before heads in one, padded heads in the other
    keys = torch.full((6, 4, 3, 16), torch.nan, device=on).transpose(1, 2)
    values = torch.full((6, 4, 4, 40), torch.nan, device=on)[:, 1:, :, 8:24]
    cache, dense = KvPlanes(keys, values), KvPlanes(*(torch.full((6, 3, 4, 16), torch.nan, device=on) for _ in "kv"))
    qkv, cos_sin = torch.randn(5, 11 * 16).to(on), make_cos_sin(16).to(on)
    positions, slots = torch.arange(5, dtype=torch.int32).to(on), torch.tensor([23, 4, 5, 0, 13]).to(on)
    q = rope_and_cache(qkv, cos_sin, positions, slots, cache, 5, 3)
    assert torch.equal(q, rope_and_cache(qkv, cos_sin, positions, slots, dense, 5, 3))
    torch.testing.assert_close(tensors(cache), tensors(dense), atol=0, rtol=0, equal_nan=True)


@TRITON
@pytest.mark.parametrize(("position", "slot"), [(-1, 20), (512, 20), (3, -1), (3, BLOCKS * BLOCK_TOKENS), (3, 2**62)])
def test_triton_leaves_a_token_out_of_range_out(on: str, position: int, slot: int) -> None:
    qkv, cos_sin = torch.randn(3, 4 * 16).to(on), make_cos_sin(16).to(on)
    positions = torch.tensor([7, position, 9], dtype=torch.int32).to(on)
    slots = torch.tensor([16, slot, 33]).to(on)
    cache = make_cache(1, 16, torch.float32, on)
    out = torch.full((3, 2, 16), torch.nan, device=on)
    rope_and_cache(qkv, cos_sin, positions, slots, cache, 2, 1, out=out)
    assert out[1].isnan().all()
    kept, other = torch.tensor([0, 2]).to(on), make_cache(1, 16, torch.float32, on)
    assert torch.equal(out[kept], rope_and_cache(qkv[kept], cos_sin, positions[kept], slots[kept], other, 2, 1))
    torch.testing.assert_close(tensors(cache), tensors(other), atol=0, rtol=0, equal_nan=True)


@DTYPES
def test_a_token_keeps_its_bits_among_others(on: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, head_dim = 5, 64
    qkv, cos_sin = torch.randn(tokens, 15 * head_dim).to(on, dtype), make_cos_sin(head_dim).to(on)
    positions, slots = torch.arange(tokens, dtype=torch.int32).to(on), torch.arange(tokens).to(on) * 7
    norms = torch.randn(2, head_dim).to(on, dtype)
    results = []
    for chunk in (tokens, 1, 3):
        cache = make_cache(3, head_dim, dtype, on)
        cuts = [slice(i, i + chunk) for i in range(0, tokens, chunk)]
        q = [rope_and_cache(qkv[c], cos_sin, positions[c], slots[c], cache, 9, 3, *norms) for c in cuts]
        results.append((torch.cat(q), *(tensor.nan_to_num() for tensor in tensors(cache))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@DTYPES
def test_a_token_keeps_its_bits_among_others_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, head_dim = 128, 9, 3, 64
    qkv, cos_sin = torch.randn(tokens, 15 * head_dim).to(dtype), make_cos_sin(head_dim)
    positions, slots = torch.arange(tokens, dtype=torch.int32), torch.randperm(BLOCKS * BLOCK_TOKENS)[:tokens]
    norms = torch.randn(2, head_dim).to(dtype)

    def run(begin: int, end: int, cache: KvPlanes) -> Tensor:
        rows = slice(begin, end)
        return rope_and_cache(qkv[rows], cos_sin, positions[rows], slots[rows], cache, heads, kv_heads, *norms)

    before = torch.get_num_threads()
    results = []
    try:
        for threads, chunk in ((1, 128), (2, 128), (1, 1), (1, 7), (2, 64)):
            torch.set_num_threads(threads)
            cache = make_cache(kv_heads, head_dim, dtype)
            q = torch.cat([run(i, min(i + chunk, tokens), cache) for i in range(0, tokens, chunk)])
            results.append((q, *(tensor.nan_to_num() for tensor in tensors(cache))))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_padding_rows_only_touch_the_null_block() -> None:
    cache = make_cache(1, 8, torch.float32)
    rope_and_cache(
        torch.zeros(4, 24), make_cos_sin(8), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64),
        cache, 1, 1,
    )  # fmt: skip
    assert cache.keys[1:].isnan().all()
    assert cache.values[1:].isnan().all()


def test_broken_contracts_are_refused() -> None:
    cache = make_cache(1, 8, torch.float32)
    arguments = {
        "qkv": torch.zeros(2, 24), "cos_sin": make_cos_sin(8), "positions": torch.zeros(2, dtype=torch.int32),
        "slots": torch.tensor([16, 17]), "cache": cache, "num_heads": 1, "num_kv_heads": 1,
    }  # fmt: skip
    for error, message, change in (
        (ValueError, "qkv must be contiguous", {"num_heads": 2}),
        (ValueError, "must have 2 heads", {"num_kv_heads": 2}),
        (ValueError, "share float32, bfloat16 or float16", {"qkv": torch.zeros(2, 24).bfloat16()}),
        (ValueError, "cos_sin must be", {"cos_sin": make_cos_sin(8).double()}),
        (ValueError, "positions must be", {"positions": torch.zeros(2, dtype=torch.int64)}),
        (ValueError, "slots must be", {"slots": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "come together", {"q_norm": torch.ones(8)}),
        (ValueError, "runs on: cpu, cuda", {"qkv": torch.zeros(2, 24, device="meta")}),
        (IndexError, "token 1: position 512", {"positions": torch.tensor([0, 512], dtype=torch.int32)}),
        (IndexError, "token 0: position 0 .* slot 640", {"slots": torch.tensor([640, 0])}),
    ):
        with pytest.raises(error, match=message):
            rope_and_cache(**{**arguments, **change})  # type: ignore[arg-type]
    assert cache.keys.isnan().all()
    assert cache.values.isnan().all()
