"""Attention that is not causal, and attention without a cache, against plain float64 attention; a row's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import dense_attention, paged_attention, paged_attention_reference
from kernels.kv_format import KvFormat, KvPlanes, quantize_rows

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def ends(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def make_qkv(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as parts of one projection, with something else beside them."""
    generator = torch.Generator().manual_seed(queries)
    q = 2 * torch.randn(queries, heads, head_dim, generator=generator)
    fused = torch.randn(keys, 2 * kv_heads + 1, head_dim, generator=generator)
    fused[:, 0] = torch.nan
    q, fused = q.to(device, dtype), fused.to(device, dtype)
    return q, fused[:, 1 : 1 + kv_heads], fused[:, 1 + kv_heads :]


def plain(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], *, causal: bool, cap: float | None = None
) -> Tensor:
    """One sequence at a time, in float64."""
    parts, group = [], q.shape[1] // k.shape[1]
    split = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for own_q, own_k, own_v in split:
        wide_k, wide_v = (rows.double().repeat_interleave(group, 1) for rows in (own_k, own_v))
        scores = torch.einsum("qhd,khd->hqk", own_q.double(), wide_k) * q.shape[2] ** -0.5
        if cap:
            scores = cap * (scores / cap).tanh()
        if causal:
            seen = torch.ones(scores.shape[1:], device=q.device).tril(scores.shape[2] - scores.shape[1]) > 0
            scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide_v))
    return torch.cat(parts).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], *, causal: bool = False) -> Tensor:
    cu_seqlens = ends(queries, q.device.type), ends(keys, q.device.type)
    out = torch.full((len(q), q.shape[1] * q.shape[2]), torch.nan, dtype=q.dtype, device=q.device)
    assert dense_attention(q, k, v, *cu_seqlens, q.shape[2] ** -0.5, causal=causal, out=out) is out
    return out


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "causal"),
    [(3, 3, 64, False), (4, 2, 40, False), (4, 2, 40, True), (2, 1, 80, False), (1, 1, 24, True), (1, 1, 160, False)],
)
def test_sequences_of_any_length_match_plain_attention(
    on: str, heads: int, kv_heads: int, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    lengths = [1, 17, 66]
    q, k, v = make_qkv(sum(lengths), sum(lengths), heads, kv_heads, head_dim, dtype, on)
    expected = plain(q, k, v, lengths, lengths, causal=causal)
    out = attend(q, k, v, lengths, lengths, causal=causal)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 64), (2, 2, 40)])
def test_across_sequences_there_may_be_more_or_fewer_keys_than_queries(
    on: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    queries, keys = [50, 3, 1, 0, 2], [5, 77, 1, 9, 0]
    q, k, v = make_qkv(sum(queries), sum(keys), heads, kv_heads, head_dim, dtype, on)
    out, expected = attend(q, k, v, queries, keys), plain(q, k, v, queries, keys, causal=False)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (out[-2:] == 0).all(), "of no keys"


def test_no_keys_at_all_and_no_queries_at_all(on: str) -> None:
    q, k, v = make_qkv(3, 7, 2, 2, 8, torch.float32, on)
    assert (attend(q, k[:0], v[:0], [1, 2], [0, 0]) == 0).all()
    assert attend(q[:0], k, v, [0, 0], [3, 4]).shape == (0, 16)
    assert attend(q[:0], k[:0], v[:0], [], []).shape == (0, 16)


@DTYPES
def test_any_strides_but_the_last_and_blocks_of_any_size_leave_the_bits_alone(on: str, dtype: torch.dtype) -> None:
    queries, keys = [9, 3], [48, 20]
    q, k, v = make_qkv(12, 68, 2, 1, 40, dtype, on)
    out = attend(q, k, v, queries, keys)
    assert torch.equal(attend(q, k.contiguous(), v.contiguous(), queries, keys), out)
    # heads before tokens in one, and every other token of a longer one; q as a part of something wider
    k_view = k.transpose(0, 1).contiguous().transpose(0, 1)
    v_view = torch.stack([v, torch.full_like(v, torch.nan)], 1).flatten(0, 1)[::2]
    q_view = torch.stack([q, torch.full_like(q, torch.nan)], 1)[:, 0]
    assert torch.equal(attend(q_view, k_view, v_view, queries, keys), out)
    # the first sequence again, in a cache
    planes = KvPlanes(*(rows[:48].unflatten(0, (3, 16)).transpose(1, 2).flip(0) for rows in (k, v)))
    index = {"dtype": torch.int32, "device": on}
    tables, context = torch.tensor([[2, 1, 0]], **index), torch.tensor([48], **index)
    paged = paged_attention(q[:9], planes, ends([9], on), context, tables, 40**-0.5, causal=False)
    assert torch.equal(paged, out[:9])


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 64), (8, 2, 40), (60, 20, 8)])
def test_a_row_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Across splits, where few sequences are shared out by them; and in a batch of single tokens."""
    queries, keys = [130, *[1] * 12], [1100, *range(1, 60, 5)]
    q, k, v = make_qkv(sum(queries), sum(keys), heads, kv_heads, head_dim, dtype, "cpu")
    whole = attend(q, k, v, queries, keys)
    torch.testing.assert_close(
        whole.double(), plain(q, k, v, queries, keys, causal=False), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attend(q, k, v, queries, keys), whole), threads
            assert torch.equal(attend(q[:130], k, v, [130], [1100]), whole[:130]), threads
            assert torch.equal(attend(q[129:130], k, v, [1], [1100]), whole[129:130]), threads
    finally:
        torch.set_num_threads(before)
    for begin, end in ((0, 1), (1, 50), (50, 130)):
        assert torch.equal(attend(q[begin:end], k[:1100], v[:1100], [end - begin], [1100]), whole[begin:end])
    alone = [
        attend(q[130 + s][None], own_k, own_v, [1], [len(own_k)])
        for s, (own_k, own_v) in enumerate(zip(k.split(keys)[1:], v.split(keys)[1:], strict=True))
    ]
    assert torch.equal(torch.cat(alone), whole[130:])


@DTYPES
def test_single_tokens_have_the_same_bits_by_splits(on: str, dtype: torch.dtype) -> None:
    """max_query_len 1, which is another kernel on CUDA: a context longer than a split, a short one and none."""
    queries, keys = [3, 1, 1], [530, 20, 0]
    q, k, v = make_qkv(5, 550, 2, 1, 64, dtype, on)
    whole = attend(q, k, v, queries, keys)
    index = {"dtype": torch.int32, "device": on}
    tables = torch.arange(530, **index) + torch.tensor([[0], [530], [0]], **index)
    out = torch.full((3, 128), torch.nan, dtype=dtype, device=on)
    paged_attention(
        q[2:], KvPlanes(k.unsqueeze(2), v.unsqueeze(2)), ends([1, 1, 1], on), torch.tensor(keys, **index), tables,
        0.125, causal=False, max_query_len=1, out=out,
    )  # fmt: skip
    assert torch.equal(out, whole[2:])
    torch.testing.assert_close(
        whole.double(), plain(q, k, v, queries, keys, causal=False), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("form", ["plain", "int8", "fp8"])
def test_soft_caps_and_quantized_caches_need_not_be_causal(on: str, form: str) -> None:
    q, k, v = make_qkv(5, 30, 4, 2, 40, torch.bfloat16, on)
    layout = KvFormat(form if form != "plain" else "bfloat16", 1, 2, 40, 8)
    planes = layout.planes(torch.zeros(4, layout.block_bytes, dtype=torch.uint8, device=on), 0)
    for rows, elements, scales in (
        (k, planes.keys, planes.key_scales),
        (v, planes.values, planes.value_scales),
    ):
        blocks = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 2)).unflatten(0, (4, 8)).transpose(1, 2)
        if scales is None:
            elements.copy_(blocks)
        else:
            for to, made in zip((elements, scales), quantize_rows(blocks.cpu(), form), strict=True):
                to.copy_(made)
    index = {"dtype": torch.int32, "device": on}
    indices = ends([5], on), torch.tensor([30], **index), torch.tensor([[0, 1, 2, 3]], **index)
    out = paged_attention(q, planes, *indices, 40**-0.5, causal=False, soft_cap=3.0)
    wide = planes.widened()
    k, v = (plane.transpose(1, 2).flatten(0, 1)[:30] for plane in (wide.keys, wide.values))
    expected = plain(q, k, v, [5], [30], causal=False, cap=3.0)
    torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=8e-3)
    wide = replace(wide, keys=wide.keys.double(), values=wide.values.double())
    reference = paged_attention_reference(q.double(), wide, *indices, 40**-0.5, causal=False, soft_cap=3.0)
    torch.testing.assert_close(reference, expected, atol=1e-12, rtol=1e-12)


def test_the_longest_sequence_of_keys_may_be_said_beforehand(on: str) -> None:
    q, k, v = make_qkv(6, 9, 2, 2, 16, torch.bfloat16, on)
    cu_seqlens = ends([4, 2], on), ends([3, 6], on)
    out = dense_attention(q, k, v, *cu_seqlens, 0.25, causal=False)
    assert torch.equal(dense_attention(q, k, v, *cu_seqlens, 0.25, causal=False, max_seqlen_k=50), out)


def test_broken_contracts_name_the_tensor() -> None:
    q, k, v = make_qkv(6, 6, 4, 2, 16, torch.float32, "cpu")
    cu_seqlens = ends([4, 2], "cpu")
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "scale": 0.25}

    def run(**changes: object) -> Tensor:
        return dense_attention(**{**arguments, "causal": False, **changes})  # type: ignore[arg-type]

    run()
    for error, message, change in (
        (ValueError, r"q must be torch.float32 \[tokens, heads, head_dim\]", {"q": q.flatten(1)}),
        (ValueError, "k must be torch.float32 .* on cpu, got torch.bfloat16", {"k": k.bfloat16()}),
        (ValueError, "v must be torch.float32 .* on cpu, got .* on meta", {"v": v.to("meta")}),
        (ValueError, r"v must be \[6, 2, 16\]", {"v": v[:5]}),
        (ValueError, "k must be .* last dimension contiguous", {"k": k.transpose(1, 2).contiguous().transpose(1, 2)}),
        (ValueError, "kv_heads divide heads", {"q": q[:, :3]}),
        (ValueError, "share float32, bfloat16 or float16", {"q": q.double(), "k": k.double(), "v": v.double()}),
        (ValueError, r"cu_seqlens_q must be int32 \[seqs \+ 1\]", {"cu_seqlens_q": cu_seqlens.long()}),
        (ValueError, r"cu_seqlens_k must be int32 \[seqs \+ 1\]", {"cu_seqlens_k": cu_seqlens[:2]}),
        (ValueError, "out must be", {"out": torch.empty(3)}),
        (IndexError, "sequence 1: 2 query tokens and a context of 3", {"cu_seqlens_k": ends([4, 3], "cpu")}),
        (IndexError, "sequence 0: 4 query tokens", {"cu_seqlens_k": ends([3, 3], "cpu"), "causal": True}),
        (IndexError, "sequence 0: .* a context of 4", {"max_seqlen_k": 3}),
    ):
        with pytest.raises(error, match=message):
            run(**change)
