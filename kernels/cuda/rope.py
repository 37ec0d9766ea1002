"""Rope and cache write: a program for each token and each few of its heads, all of q, all of k or all of v."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant
from kernels.kv_format import KvPlanes

_GROUP = 4  # heads of a program; what a head is computed with does not depend on its neighbours there


@triton.jit
def _rotate(
    x, y, within, cos_sin, norm, eps,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads at x [heads, 1] to y [heads, 1], those that are `within`."""
    half: tl.constexpr = ROTARY // 2
    pair = tl.arange(0, PAIRS)
    low = pair * 2 if INTERLEAVED else pair
    high = low + 1 if INTERLEAVED else low + half
    rest = ROTARY + tl.arange(0, REST)
    rotated = within & (pair < half)[None, :]
    passed = within & (rest < HEAD_DIM)[None, :]

    cosine = tl.load(cos_sin + pair, pair < half, other=0.0)[None, :]
    sine = tl.load(cos_sin + half + pair, pair < half, other=0.0)[None, :]
    first = tl.load(x + low[None, :], rotated, other=0.0).to(tl.float32)
    second = tl.load(x + high[None, :], rotated, other=0.0).to(tl.float32)
    others = tl.load(x + rest[None, :], passed, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first + second * second, 1) + tl.sum(others * others, 1)
        inverse = (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]
        first = first * inverse * tl.load(norm + low, pair < half, other=0.0).to(tl.float32)[None, :]
        second = second * inverse * tl.load(norm + high, pair < half, other=0.0).to(tl.float32)[None, :]
        others = others * inverse * tl.load(norm + rest, rest < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y + low[None, :], narrow(first * cosine - second * sine, dtype), rotated)
    tl.store(y + high[None, :], narrow(second * cosine + first * sine, dtype), rotated)
    tl.store(y + rest[None, :], narrow(others, dtype), passed)


@triton.jit
def _rope_and_cache(
    qkv, cos_sin, positions, slots, out, k_cache, v_cache, q_norm, k_norm,
    k_block_stride, k_head_stride, k_token_stride, v_block_stride, v_head_stride, v_token_stride,
    max_positions, num_blocks, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    kv_groups: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    block = slot // BLOCK_TOKENS
    offset = slot % BLOCK_TOKENS
    valid = (position >= 0) & (position < max_positions) & (slot >= 0) & (block < num_blocks)
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    turn = cos_sin + position.to(tl.int64) * ROTARY
    if not valid:
        return
    if group < q_groups:
        heads = (group * GROUP + tl.arange(0, GROUP))[:, None]
        start = out + token * (HEADS * HEAD_DIM)
        _rotate(
            row + heads * HEAD_DIM, start + heads * HEAD_DIM, heads < HEADS, turn, q_norm, eps,
            HEAD_DIM, ROTARY, INTERLEAVED, NORMED, PAIRS, REST,
        )  # fmt: skip
    elif group < q_groups + kv_groups:
        heads = ((group - q_groups) * GROUP + tl.arange(0, GROUP))[:, None]
        start = k_cache + block * k_block_stride + offset * k_token_stride
        _rotate(
            row + (HEADS + heads) * HEAD_DIM, start + heads.to(tl.int64) * k_head_stride, heads < KV_HEADS, turn,
            k_norm, eps, HEAD_DIM, ROTARY, INTERLEAVED, NORMED, PAIRS, REST,
        )  # fmt: skip
    else:
        heads = ((group - q_groups - kv_groups) * GROUP + tl.arange(0, GROUP))[:, None]
        start = v_cache + block * v_block_stride + offset * v_token_stride
        dims = tl.arange(0, DIM)[None, :]
        within = (heads < KV_HEADS) & (dims < HEAD_DIM)
        value = tl.load(row + (HEADS + KV_HEADS + heads) * HEAD_DIM + dims, within)
        tl.store(start + heads.to(tl.int64) * v_head_stride + dims, value, within)


def rope_and_cache(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: KvPlanes,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
    out: Tensor,
) -> None:
    """out: q."""
    tokens, num_heads, head_dim = out.shape
    num_blocks, num_kv_heads, block_tokens, _ = cache.keys.shape
    max_positions, rotary = cos_sin.shape
    constants = _constants(num_heads, num_kv_heads, head_dim, rotary, block_tokens, interleaved, q_norm is not None)
    arguments = (
        qkv, cos_sin, positions, slots, out, cache.keys, cache.values, q_norm, k_norm,
        *cache.keys.stride()[:3], *cache.values.stride()[:3], max_positions, num_blocks, eps,
    )  # fmt: skip
    groups = triton.cdiv(num_heads, _GROUP) + 2 * triton.cdiv(num_kv_heads, _GROUP)
    launch(_rope_and_cache, (tokens, groups), *arguments, **constants, num_warps=_num_warps(head_dim))


def variants(capability: int) -> list[Variant]:
    """SmolLM2-135M, Llama-3.1-8B, a q/k norm, and a rotary part, interleaved."""
    models = (
        ("9/3x64", (9, 3, 64, 64, 16, False, False)),
        ("32/8x128", (32, 8, 128, 128, 16, False, False)),
        ("32/8x128 normed", (32, 8, 128, 128, 16, False, True)),
        ("16/16x256 of which 64 interleaved", (16, 16, 256, 64, 16, True, False)),
    )
    strides = [f"{cache}_{of}_stride" for cache in "kv" for of in ("block", "head", "token")]
    return [
        Variant(
            name=f"rope_and_cache {dtype} {name}",
            kernel=_rope_and_cache,
            arguments={
                "qkv": f"*{dtype}",
                "cos_sin": "*fp32",
                "positions": "*i32",
                "slots": "*i64",
                **dict.fromkeys(("out", "k_cache", "v_cache", "q_norm", "k_norm"), f"*{dtype}"),
                **dict.fromkeys(strides, "i32"),
                **dict.fromkeys(("max_positions", "num_blocks"), "i32"),
                "eps": "fp32",
            },
            constants=_constants(*shape),
            aligned=tuple(strides),
            num_warps=_num_warps(shape[2]),
        )
        for dtype in ("bf16", "fp32")
        for name, shape in models
    ]


def _constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary: int,
    block_tokens: int,
    interleaved: bool,
    normed: bool,
) -> dict[str, int | bool]:
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "ROTARY": rotary,
        "BLOCK_TOKENS": block_tokens,
        "INTERLEAVED": interleaved,
        "NORMED": normed,
        "GROUP": _GROUP,
        "PAIRS": max(triton.next_power_of_2(rotary // 2), 1),
        "REST": max(triton.next_power_of_2(head_dim - rotary), 1),
        "DIM": triton.next_power_of_2(head_dim),
    }


def _num_warps(head_dim: int) -> int:
    """16 elements for each thread."""
    return max(_GROUP * head_dim // 512, 1)
