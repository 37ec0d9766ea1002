"""Rotary position embedding of a fused qkv projection, with the cache write and the optional per-head q/k norm.

    rotate-half (Su et al. 2021, arXiv:2104.09864, in the half-split order of Llama checkpoints), for i < rotary / 2:
        y[i]              = x[i] * cos[p, i] - x[i + rotary / 2] * sin[p, i]
        y[i + rotary / 2] = x[i + rotary / 2] * cos[p, i] + x[i] * sin[p, i]
    interleaved (the order of the paper and of GPT-J): the same of x[2i] and x[2i + 1]

Dimensions from `rotary` on pass through, all of them where it is 0: a position then only has to be in range. With
q_norm and k_norm, each head is first RMS-normalised (Qwen 3).

    qkv          [tokens, (heads + 2 * kv_heads) * head_dim]: q heads, k heads, v heads
    cos_sin      [max_positions, rotary] float32: cos in the first half of a row, sin in the second, of frequencies
                 scaled as the model wants them, any attention factor multiplied in
    positions    [tokens] int32, absolute
    slots        [tokens] int64, block * block_tokens + offset: where k and v go
    cache        of kv_heads heads, KvPlanes
    q_norm       [head_dim], qkv's dtype or float32; k_norm alike
    q (returned) [tokens, heads, head_dim]

float32 inside, rounded once at the end. Of k and v a cache with scales gets what one of qkv's dtype would have got,
quantized: a block that is converted later has the same bytes. A token's bits depend on that token alone. Two tokens of
one call may only share a slot of the null block, whose content nobody reads.

On CUDA nobody waits for the values of positions and slots: a token with one out of range is left out, with nothing
of it read or written, its row of q included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import CODES
from kernels.kv_format import KvPlanes, quantize_rows
from kernels.rms_norm import rms_norm_reference


def rope_and_cache(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: KvPlanes,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates q and k, writes k and v into the cache, returns q; see the module for shapes.

    float32, bfloat16 or float16 (qkv and a plain cache alike); head_dim a multiple of 8, rotary even and at most
    head_dim. Raises ValueError when a tensor breaks the contract and, on a CPU, IndexError, with nothing written, when
    a position or slot is out of range.
    """
    triton = in_triton("rope_and_cache", qkv)
    tokens = qkv.shape[0]
    num_blocks, _, block_tokens, head_dim = cache.keys.shape
    _check(qkv, cos_sin, positions, slots, cache, num_heads, num_kv_heads, q_norm, k_norm)
    if out is None:
        out = qkv.new_empty(tokens, num_heads, head_dim)
    elif out.dtype != qkv.dtype or out.shape != (tokens, num_heads, head_dim) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {qkv.dtype} [{tokens}, {num_heads}, {head_dim}], got {out.dtype} {list(out.shape)}"
        )
    if triton:
        from kernels.cuda.rope import rope_and_cache as launch

        launch(qkv, cos_sin, positions, slots, cache, q_norm, k_norm, eps, interleaved, out)
        return out
    failed = library.call("tandem_rope_and_cache",
        qkv.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), slots.data_ptr(),
        out.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(),
        *cache.keys.stride()[:3], *cache.values.stride()[:3],
        tokens, num_heads, num_kv_heads, head_dim, cos_sin.shape[1], cos_sin.shape[0], num_blocks, block_tokens,
        None if q_norm is None else q_norm.data_ptr(), None if k_norm is None else k_norm.data_ptr(),
        float(eps), 0 if q_norm is None else CODES[q_norm.dtype], CODES[qkv.dtype],
        int(interleaved), torch.get_num_threads(), *cache.c_arguments(),
    )  # fmt: skip
    if failed:
        token = failed - 1
        raise IndexError(
            f"token {token}: position {int(positions[token])} must be below {cos_sin.shape[0]} "
            f"and slot {int(slots[token])} below {num_blocks * block_tokens}"
        )
    return out


def rope_and_cache_reference(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: KvPlanes,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> Tensor:
    """The same in plain torch, in the dtype of its inputs (float64 for tests)."""
    _, _, block_tokens, head_dim = cache.keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    cosine, sine = cos_sin[positions.long()][:, None].chunk(2, -1)  # each [tokens, 1, rotary / 2]

    def rotate(x: Tensor) -> Tensor:
        rotated, rest = x.tensor_split([cos_sin.shape[1]], -1)
        low, high = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
        low, high = low * cosine - high * sine, high * cosine + low * sine
        rotated = torch.stack([low, high], -1).flatten(-2) if interleaved else torch.cat([low, high], -1)
        return torch.cat([rotated, rest], -1)

    blocks, offsets = slots // block_tokens, slots % block_tokens
    for rows, elements, scales in ((rotate(k), cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        if scales is None:
            elements[blocks, :, offsets] = rows
        else:
            elements[blocks, :, offsets], scales[blocks, :, offsets] = quantize_rows(rows, cache.form)
    return rotate(q)


def _check(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: KvPlanes,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    cache.check("qkv", qkv)
    dtype, tokens, head_dim = qkv.dtype, qkv.shape[0], cache.keys.shape[3]
    if cache.keys.shape[1] != num_kv_heads:
        raise ValueError(f"keys and values must have {num_kv_heads} heads, got {list(cache.keys.shape)}")
    if qkv.shape != (tokens, (num_heads + 2 * num_kv_heads) * head_dim) or not qkv.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous [tokens, ({num_heads} + 2 * {num_kv_heads}) * {head_dim}], got {list(qkv.shape)}"
        )
    rotary = cos_sin.shape[1]
    if cos_sin.dtype != torch.float32 or rotary % 2 or rotary > head_dim or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin must be contiguous float32 [max_positions, even and at most {head_dim}], "
            f"got {cos_sin.dtype} {list(cos_sin.shape)}"
        )
    for name, tensor, wanted in (("positions", positions, torch.int32), ("slots", slots, torch.int64)):
        if tensor.dtype != wanted or tensor.shape != (tokens,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {wanted} [{tokens}], got {tensor.dtype} {list(tensor.shape)}")
    if q_norm is None and k_norm is None:
        return
    if q_norm is None or k_norm is None or q_norm.dtype != k_norm.dtype:
        raise ValueError("q_norm and k_norm come together, of one dtype")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight.dtype not in (dtype, torch.float32) or weight.shape != (head_dim,) or not weight.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} or float32 [{head_dim}], got {weight.dtype} {list(weight.shape)}"
            )
