"""Paged attention for ragged prefill, prefill after a cached prefix, and decode.

    out[t, h] = softmax(scale * q[t, h] @ K[: p + 1].T) @ V[: p + 1]          p = absolute position of token t

K and V are the sequence's keys and values of kv head `h // (heads / kv_heads)`, gathered through its block table;
with a sliding window W only positions p - W + 1 .. p count. A soft cap C makes of a scaled score C * tanh(score / C)
(Gemma 2, arXiv:2408.00118), and ALiBi then adds -slope[h] * (p - key) to it (arXiv:2108.12409). Sequence s owns the
query tokens cu_seqlens[s] .. cu_seqlens[s + 1], the last ones of its context_lens[s] tokens in the cache: a decode step
is a query of one token. Where attention is not causal, each of them sees all context_lens[s] tokens, be these more or
fewer than the queries: an encoder's own, or those of another sequence (cross attention). A query of none gets 0.

    q            [tokens, heads, head_dim]
    cache        KvPlanes
    cu_seqlens   [seqs + 1] int32
    context_lens [seqs] int32, tokens in the cache with this call's own
    block_tables [seqs, max_blocks] int32; entries beyond the context are never read
    alibi_slopes [heads] float32
    out          [tokens, heads * head_dim]

A block may be a token of an ordinary activation: `dense_attention` attends without a cache.

A row's bits depend on its own query, keys and values alone: not on the neighbours, the chunking or the thread count
(kernels/cpu/attention.c and kernels/cuda/attention.py say how), nor on CUDA on which of the two kernels computed it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES
from kernels.kv_format import KvPlanes

SPLIT_TOKENS = 512  # keys of a partial result of decode on CUDA

_MAX_HEAD_DIM = 512  # a thread's tiles live on its stack
_MAX_TRITON_HEAD_DIM = 256  # a program's tiles live in registers


def paged_attention(
    q: Tensor,
    cache: KvPlanes,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
    *,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    max_query_len: int | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each query token over its sequence's cache; see the module for shapes.

    float32, bfloat16 or float16 (q, a plain cache and out alike), float32 inside; head_dim a multiple of 8. Raises
    ValueError when a tensor breaks the contract and, in C, IndexError when lengths or block tables point outside the
    cache: on CUDA, where nobody reads them on the host, what lies outside is neither read nor written.

    sliding_window and alibi_slopes ask for a position, which a query has only where attention is causal.

    max_query_len says how many query tokens a sequence has at most: where it is 1, contexts are shared out by splits on
    CUDA, with partial results in `workspace`, contiguous float32 of attention_workspace elements (allocated when
    missing). In C these two change nothing.
    """
    tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_tokens, _ = cache.keys.shape
    triton = in_triton("paged_attention", q)
    max_head_dim = _MAX_TRITON_HEAD_DIM if triton else _MAX_HEAD_DIM
    _check(q, cache, cu_seqlens, context_lens, block_tables, sliding_window, max_head_dim)
    _check_scores(q, sliding_window, causal, alibi_slopes, soft_cap)
    num_seqs, max_blocks = block_tables.shape
    if max_query_len is not None and tokens > num_seqs * max_query_len:
        raise ValueError(f"max_query_len {max_query_len} and {num_seqs} sequences do not make {tokens} query tokens")
    if out is None:
        out = torch.empty(tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    elif out.dtype != q.dtype or out.device != q.device or out.numel() != q.numel() or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {q.dtype} tensor of {q.numel()} elements on {q.device}, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if triton:
        from kernels.cuda.attention import paged_attention as launch

        decode = max_query_len == 1
        workspace = _workspace(workspace, q, num_seqs, max_blocks * block_tokens) if decode else None
        launch(
            q, cache, cu_seqlens, context_lens, block_tables, scale, sliding_window, causal, alibi_slopes, soft_cap,
            workspace, out,
        )  # fmt: skip
        return out
    failed = library.call("tandem_paged_attention",
        q.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), out.data_ptr(),
        cu_seqlens.data_ptr(), context_lens.data_ptr(), block_tables.data_ptr(),
        tokens, num_seqs, max_blocks, block_tables.stride(0), num_blocks, block_tokens,
        *cache.keys.stride()[:3], *cache.values.stride()[:3],
        num_heads, num_kv_heads, head_dim, sliding_window or 0, float(scale), float(soft_cap or 0),
        None if alibi_slopes is None else alibi_slopes.data_ptr(), int(causal), CODES[q.dtype],
        torch.get_num_threads(), *cache.c_arguments(),
    )  # fmt: skip
    if failed:
        _raise(failed, num_seqs, tokens, cu_seqlens, context_lens)
    return out


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    *,
    causal: bool,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """paged_attention without a cache: each row of keys and values is a block of one token.

        q             [tokens, heads, head_dim]; copied where it is not contiguous
        k, v          [kv_tokens, kv_heads, head_dim], any strides but the last: parts of a fused projection, say
        cu_seqlens_q  [seqs + 1] int32; cu_seqlens_k alike. Where causal, a sequence's queries are its last tokens
        out           [tokens, heads * head_dim]

    max_seqlen_k is the length of the longest sequence of keys: without it, it is read from cu_seqlens_k, and on CUDA
    waited for. Raises ValueError naming the tensor that breaks the contract, and what paged_attention raises.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} [tokens, heads, head_dim] on {q.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != k.shape or tensor.stride(2) != 1:
            raise ValueError(
                f"{name} must be {list(k.shape)} with its last dimension contiguous, "
                f"got {list(tensor.shape)} with strides {tensor.stride()}"
            )
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dtype != torch.int32 or tensor.shape != cu_seqlens_q.shape or tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name} must be int32 [seqs + 1] like the other, got {tensor.dtype} {list(tensor.shape)}")
    context_lens = cu_seqlens_k.diff()
    if max_seqlen_k is None:
        max_seqlen_k = int(context_lens.max()) if len(context_lens) else 0
    rows = torch.arange(max(max_seqlen_k, 1), dtype=torch.int32, device=cu_seqlens_k.device)
    return paged_attention(
        q.contiguous(),
        KvPlanes(k.unsqueeze(2), v.unsqueeze(2)),
        cu_seqlens_q,
        context_lens,
        cu_seqlens_k[:-1, None] + rows,
        scale,
        causal=causal,
        out=out,
    )


def attention_workspace(seqs: int, heads: int, head_dim: int, max_context: int) -> int:
    """float32 elements of partial results, for block tables of max_context tokens."""
    return seqs * heads * -(-max_context // SPLIT_TOKENS) * (head_dim + 2)


def paged_attention_reference(
    q: Tensor,
    cache: KvPlanes,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
    *,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The same in plain torch, one sequence at a time, in the dtype of its inputs (float64 for tests)."""
    cache, (tokens, num_heads, head_dim) = cache.widened(), q.shape
    _, num_kv_heads, block_tokens, _ = cache.keys.shape
    out = torch.empty_like(q)
    for s, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        context = int(context_lens[s])
        table = block_tables[s, : -(-context // block_tokens)].long()
        # [kv_heads, context, head_dim], then one per query head
        keys, values = (
            plane[table].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :context].to(q.dtype)
            for plane in (cache.keys, cache.values)
        )
        keys = keys.repeat_interleave(num_heads // num_kv_heads, 0)
        values = values.repeat_interleave(num_heads // num_kv_heads, 0)
        scores = q[start:end].transpose(0, 1) @ keys.transpose(1, 2) * scale  # [heads, queries, context]
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        position = torch.arange(context - (end - start), context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None]
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None].to(q.dtype) * (position - key)
        hidden = (key > position) & causal
        if sliding_window:
            hidden |= key <= position - sliding_window
        out[start:end] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return out.reshape(tokens, num_heads * head_dim)


def _check(
    q: Tensor,
    cache: KvPlanes,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    window: int | None,
    max_head_dim: int,
) -> None:
    cache.check("q", q)
    _, num_heads, head_dim = q.shape
    if head_dim % 8 or not 0 < head_dim <= max_head_dim:
        raise ValueError(f"head_dim must be a multiple of 8 up to {max_head_dim}, got {head_dim}")
    if cache.keys.shape[3] != head_dim or num_heads % cache.keys.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} does not fit keys and values {list(cache.keys.shape)}: "
            "head_dim must agree and kv_heads divide heads"
        )
    if not q.is_contiguous():
        raise ValueError("q must be contiguous")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("context_lens", context_lens), ("block_tables", block_tables)):
        if tensor.dtype != torch.int32 or (tensor.stride(-1) != 1 and tensor.numel()):
            raise ValueError(
                f"{name} must be int32 with its last dimension contiguous, got {tensor.dtype} {tensor.stride()}"
            )
    for tensor in (cu_seqlens, context_lens, block_tables):
        if tensor.device != q.device:
            raise ValueError(f"all tensors must be on {q.device} like q, got one on {tensor.device}")
    num_seqs = block_tables.shape[0]
    if cu_seqlens.shape != (num_seqs + 1,) or context_lens.shape != (num_seqs,):
        raise ValueError(
            f"block_tables has {num_seqs} sequences, cu_seqlens {list(cu_seqlens.shape)} (wanted one more) "
            f"and context_lens {list(context_lens.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None, got {window}")


def _check_scores(
    q: Tensor, window: int | None, causal: bool, alibi_slopes: Tensor | None, soft_cap: float | None
) -> None:
    for name, given in (("sliding_window", window), ("alibi_slopes", alibi_slopes)):
        if given is not None and not causal:
            raise ValueError(f"{name} needs causal attention: leave it out, or leave out causal=False")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be above 0 or None, got {soft_cap}")
    if alibi_slopes is None:
        return
    if (
        alibi_slopes.dtype != torch.float32
        or alibi_slopes.shape != q.shape[1:2]
        or not alibi_slopes.is_contiguous()
        or alibi_slopes.device != q.device
    ):
        raise ValueError(
            f"alibi_slopes must be contiguous float32 [{q.shape[1]}] on {q.device}, "
            f"got {alibi_slopes.dtype} {list(alibi_slopes.shape)} on {alibi_slopes.device}"
        )


def _workspace(workspace: Tensor | None, q: Tensor, num_seqs: int, max_context: int) -> Tensor:
    """The caller's, or one for this call."""
    size = attention_workspace(num_seqs, q.shape[1], q.shape[2], max_context)
    if workspace is None:
        return torch.empty(size, dtype=torch.float32, device=q.device)
    if (
        workspace.dtype != torch.float32
        or workspace.dim() != 1
        or workspace.numel() < size
        or not workspace.is_contiguous()
        or workspace.device != q.device
    ):
        raise ValueError(
            f"workspace must be contiguous float32 [{size}] or longer on {q.device}, "
            f"got {workspace.dtype} {list(workspace.shape)} on {workspace.device}"
        )
    return workspace


def _raise(failed: int, num_seqs: int, tokens: int, cu_seqlens: Tensor, context_lens: Tensor) -> None:
    if failed < 0:
        raise MemoryError("no memory for the partial results of paged_attention")
    if failed > num_seqs:
        raise IndexError(
            f"cu_seqlens must go from 0 to {tokens} tokens, got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    s = failed - 1
    raise IndexError(
        f"sequence {s}: {int(cu_seqlens[s + 1] - cu_seqlens[s])} query tokens and a context of {int(context_lens[s])} "
        "do not fit its block table, or the table names a block outside the cache"
    )
