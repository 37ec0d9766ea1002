"""Rope and cache write: a program for each token and each few of its heads, all of q, all of k or all of v."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.elements import encode, most_of, scale_arguments, scale_of, scale_types
from kernels.cuda.tile import launch, narrow
from kernels.cuda.variant import Variant
from kernels.kv_format import GREATEST, KvPlanes

_GROUP = 4  # heads of a program; what a head is computed with does not depend on its neighbours there


@triton.jit
def _rotate(
    x, y, scales, within, cos_sin, norm, eps,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Heads at x [heads, 1] to y [heads, 1], those that are `within`; in a form that is not plain, with scales."""
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
    dtype: tl.constexpr = x.dtype.element_ty
    lower = narrow(first * cosine - second * sine, dtype)
    upper = narrow(second * cosine + first * sine, dtype)
    others = narrow(others, dtype)
    if FORM == "plain":
        tl.store(y + low[None, :], lower, rotated)
        tl.store(y + high[None, :], upper, rotated)
        tl.store(y + rest[None, :], others, passed)
    else:
        lower, upper, others = lower.to(tl.float32), upper.to(tl.float32), others.to(tl.float32)
        most = tl.maximum(most_of(lower), most_of(upper), tl.PropagateNan.ALL)
        scale, inverse = scale_of(tl.maximum(most, most_of(others), tl.PropagateNan.ALL)[:, None], FORM)
        tl.store(y + low[None, :], encode(lower * inverse, FORM), rotated)
        tl.store(y + high[None, :], encode(upper * inverse, FORM), rotated)
        tl.store(y + rest[None, :], encode(others * inverse, FORM), passed)
        tl.store(scales, scale, within)


@triton.jit
def _rope_and_cache(
    qkv, cos_sin, positions, slots, out, k_cache, v_cache, q_norm, k_norm,
    k_block_stride, k_head_stride, k_token_stride, v_block_stride, v_head_stride, v_token_stride,
    max_positions, num_blocks, eps, k_scales, v_scales,
    k_scale_block, k_scale_head, v_scale_block, v_scale_head, k_scale_token, v_scale_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr,
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
        q_start = out + token * (HEADS * HEAD_DIM)
        _rotate(
            row + heads * HEAD_DIM, q_start + heads * HEAD_DIM, None, heads < HEADS, turn, q_norm, eps,
            HEAD_DIM, ROTARY, INTERLEAVED, NORMED, PAIRS, REST, "plain",
        )  # fmt: skip
    elif group < q_groups + kv_groups:
        heads = ((group - q_groups) * GROUP + tl.arange(0, GROUP))[:, None]
        k_start = k_cache + block * k_block_stride + offset * k_token_stride
        key_scales = None
        if FORM != "plain":
            key_scales = k_scales + block * k_scale_block + offset * k_scale_token + heads.to(tl.int64) * k_scale_head
        _rotate(
            row + (HEADS + heads) * HEAD_DIM, k_start + heads.to(tl.int64) * k_head_stride, key_scales,
            heads < KV_HEADS, turn, k_norm, eps, HEAD_DIM, ROTARY, INTERLEAVED, NORMED, PAIRS, REST, FORM,
        )  # fmt: skip
    else:
        heads = ((group - q_groups - kv_groups) * GROUP + tl.arange(0, GROUP))[:, None]
        v_start = v_cache + block * v_block_stride + offset * v_token_stride
        dims = tl.arange(0, DIM)[None, :]
        within = (heads < KV_HEADS) & (dims < HEAD_DIM)
        value = tl.load(row + (HEADS + KV_HEADS + heads) * HEAD_DIM + dims, within, other=0.0)
        if FORM != "plain":
            value = value.to(tl.float32)
            scale, inverse = scale_of(most_of(value)[:, None], FORM)
            value = encode(value * inverse, FORM)
            scale_start = v_scales + block * v_scale_block + offset * v_scale_token
            tl.store(scale_start + heads.to(tl.int64) * v_scale_head, scale, heads < KV_HEADS)
        tl.store(v_start + heads.to(tl.int64) * v_head_stride + dims, value, within)


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
    shape = num_heads, num_kv_heads, head_dim, rotary, block_tokens, interleaved, q_norm is not None
    constants = _constants(*shape, cache.form)
    arguments = (
        qkv, cos_sin, positions, slots, out, cache.keys, cache.values, q_norm, k_norm,
        *cache.keys.stride()[:3], *cache.values.stride()[:3], max_positions, num_blocks, eps, *scale_arguments(cache),
    )  # fmt: skip
    groups = triton.cdiv(num_heads, _GROUP) + 2 * triton.cdiv(num_kv_heads, _GROUP)
    launch(_rope_and_cache, (tokens, groups), *arguments, **constants, num_warps=_num_warps(head_dim))


def variants(capability: int) -> list[Variant]:
    """SmolLM2-135M, Llama-3.1-8B, a q/k norm, a rotary part, interleaved, and GPT-2, which rotates nothing."""
    models = (
        ("9/3x64", (9, 3, 64, 64, 16, False, False)),
        ("32/8x128", (32, 8, 128, 128, 16, False, False)),
        ("32/8x128 normed", (32, 8, 128, 128, 16, False, True)),
        ("16/16x256 of which 64 interleaved", (16, 16, 256, 64, 16, True, False)),
        ("12/12x64 of which 0", (12, 12, 64, 0, 16, False, False)),
    )
    return [
        _variant(f"{dtype} {name}{'' if form == 'plain' else f' to {form}'}", dtype, shape, form)
        for dtype in ("bf16", "fp32")
        for name, shape in models
        for form in ("plain", *GREATEST)
    ]


def _variant(name: str, dtype: str, shape: tuple[int, int, int, int, int, bool, bool], form: str) -> Variant:
    strides = [f"{cache}_{of}_stride" for cache in "kv" for of in ("block", "head", "token")]
    scales, constants = scale_types(form)
    return Variant(
        name=f"rope_and_cache {name}",
        kernel=_rope_and_cache,
        arguments={
            "qkv": f"*{dtype}",
            "cos_sin": "*fp32",
            "positions": "*i32",
            "slots": "*i64",
            "out": f"*{dtype}",
            **dict.fromkeys(("k_cache", "v_cache"), f"*{dtype}" if form == "plain" else "*i8"),
            **dict.fromkeys(("q_norm", "k_norm"), f"*{dtype}"),
            **dict.fromkeys(strides, "i32"),
            **dict.fromkeys(("max_positions", "num_blocks"), "i32"),
            "eps": "fp32",
            **scales,
        },
        constants=_constants(*shape, form) | constants,
        aligned=(*strides, *scales),
        num_warps=_num_warps(shape[2]),
    )


def _constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary: int,
    block_tokens: int,
    interleaved: bool,
    normed: bool,
    form: str,
) -> dict[str, int | bool | str]:
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
        "FORM": form,
    }


def _num_warps(head_dim: int) -> int:
    """16 elements for each thread."""
    return max(_GROUP * head_dim // 512, 1)
