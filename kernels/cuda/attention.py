"""Paged attention. A row is one (query token, head); its keys are cut at absolute positions into splits of tiles:

    per tile    s = q k^T * scale;  m' = max(m, max s);  p = 2^(s - m')
                total = total 2^(m - m') + sum p;  o = o 2^(m - m') + p v
    per split   an own (m, total, o), merged into the row's in order of position
    at the end  o / total

A prefill program takes its rows through all of their splits; a decode program takes one split of one token's rows, and
_reduce merges what these leave in the workspace. Both are made of _attend, _merge and _finish: a row has the same bits
in any call. What a row does not see changes nothing: an m of -inf scales by exactly 0 what it belongs to and by exactly
1 what it is merged into, so a tile that no row of a program sees may as well be left out.

Loop-invariant code stays in its loop: a row's total over all splits needs the registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import SPLIT_TOKENS
from kernels.cuda.elements import decode, scale_arguments, scale_types
from kernels.cuda.tile import dot, launch, narrow
from kernels.cuda.variant import Variant
from kernels.kv_format import GREATEST, KvPlanes

_SPLIT = tl.constexpr(SPLIT_TOKENS)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _columns(columns, HEAD_DIM: tl.constexpr):
    """[1, width]: of a head rather than padding. None of a width that needs no padding is a mask less to hold."""
    return (columns < HEAD_DIM)[None] if columns.shape[0] != HEAD_DIM else tl.full([1, columns.shape[0]], True, tl.int1)


@triton.jit
def _attend(
    q, positions, slopes, k_cache, v_cache, table, num_blocks, k_block, k_token, v_block, v_token, first, last,
    scale, cap, window, k_scales, v_scales, k_scale_block, v_scale_block, k_scale_token, v_scale_token,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, KEYS: tl.constexpr, CAPS: tl.constexpr,
    ALIBI: tl.constexpr, WINDOWED: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The (m, total, o) of q's rows over keys first .. last of one split. Keys outside are as if they were 0."""
    columns = tl.arange(0, q.shape[1])
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    o = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    for start in tl.range(first // KEYS * KEYS, last, KEYS, disable_licm=True):  # pyright: ignore[reportGeneralTypeIssues]
        keys = start + tl.arange(0, KEYS)
        block = tl.load(table + keys // BLOCK_TOKENS, (keys >= first) & (keys < last), other=-1)
        present = (block >= 0) & (block < num_blocks)
        within = present[:, None] & _columns(columns, HEAD_DIM)
        block = block.to(tl.int64)
        slot = keys % BLOCK_TOKENS
        k = tl.load(k_cache + (block * k_block + slot * k_token)[:, None] + columns[None], within, other=0)
        v = tl.load(v_cache + (block * v_block + slot * v_token)[:, None] + columns[None], within, other=0)
        if FORM != "plain":
            key_scale = tl.load(k_scales + block * k_scale_block + slot * k_scale_token, present, other=0.0)
            value_scale = tl.load(v_scales + block * v_scale_block + slot * v_scale_token, present, other=0.0)
            k, value = narrow(decode(k, FORM, 0), q.dtype), decode(v, FORM, 0)
            if q.dtype == tl.float16:  # whose least numbers are too large for a small weight times a small scale
                value *= value_scale[:, None]
            v = narrow(value, q.dtype)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32)) * scale
        if FORM != "plain":
            scores *= key_scale[None]  # pyright: ignore[reportPossiblyUnboundVariable]
        if CAPS:  # cap * tanh(score), of e^(2 score); 64 is beyond where the tanh is 1
            scores = cap * (1.0 - 2.0 / (tl.exp2(tl.minimum(scores, 64.0, tl.PropagateNan.ALL)) + 1.0))
        if ALIBI:
            scores += slopes[:, None] * (keys[None] - positions[:, None]).to(tl.float32)
        seen = keys[None] <= positions[:, None]
        if WINDOWED:
            seen &= keys[None] > positions[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf is no number
        decay = tl.exp2(m - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(weights, 1)
        if FORM != "plain" and q.dtype != tl.float16:
            weights *= value_scale[None]  # pyright: ignore[reportPossiblyUnboundVariable]
        o = dot(narrow(weights, v.dtype), v, o * decay[:, None])
        m = highest
    return m, total, o


@triton.jit
def _merge(m, total, o, split_m, split_total, split_o):
    """A row's total with its next split."""
    highest = tl.maximum(m, split_m)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    before, here = tl.exp2(m - base), tl.exp2(split_m - base)
    return highest, total * before + split_total * here, o * before[:, None] + split_o * here[:, None]


@triton.jit
def _finish(total, o):
    """o / total, and 0 for a row that saw nothing."""
    return o * (1.0 / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def _sequence_of(tile, cu_seqlens, seqs, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that a tile belongs to. Sequence s begins at tile cu_seqlens[s] * GROUP // ROWS + s: nobody has to
    sum up how many tiles the sequences before it need, and all of them have as many as they need."""
    low, high = 0, seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) * GROUP // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["tokens", "seqs", "max_blocks", "table_stride", "num_blocks"])
def _prefill(
    q, k_cache, v_cache, cu_seqlens, context_lens, block_tables, alibi_slopes, tokens, max_blocks, table_stride,
    num_blocks, k_block, k_head, k_token, v_block, v_head, v_token, scale, cap, window, out, seqs,
    k_scales, v_scales, k_scale_block, k_scale_head, v_scale_block, v_scale_head, k_scale_token, v_scale_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, CAPS: tl.constexpr, ALIBI: tl.constexpr, WINDOWED: tl.constexpr, FORM: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of ROWS rows, kv heads. Row r of a sequence: token r // GROUP, head r % GROUP of the kv head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's last tile sees the most keys: it starts first
    sequence = _sequence_of(tile, cu_seqlens, seqs, GROUP, ROWS)
    start = tl.load(cu_seqlens + sequence)
    length = tl.minimum(tl.load(cu_seqlens + sequence + 1), tokens) - start
    first_row = (tile - start * GROUP // ROWS - sequence) * ROWS
    if first_row >= length * GROUP:
        return
    rows = first_row + tl.arange(0, ROWS)
    kv_head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    first_token = first_row // GROUP
    base = ((start + first_token).to(tl.int64) * tl.num_programs(1) + kv_head) * (GROUP * HEAD_DIM)
    stride = tl.num_programs(1) * (GROUP * HEAD_DIM)  # of tokens
    offsets = ((rows // GROUP - first_token) * stride + rows % GROUP * HEAD_DIM)[:, None] + columns[None]
    within = (rows < length * GROUP)[:, None] & _columns(columns, HEAD_DIM)
    queries = tl.load(q + base + offsets, within, other=0.0)
    slopes = tl.load(alibi_slopes + kv_head * GROUP + rows % GROUP) * _LOG2_E if ALIBI else 0.0
    context = tl.load(context_lens + sequence)
    before = context - length
    last_row = tl.minimum(first_row + ROWS, length * GROUP) - 1
    if CAUSAL:
        positions = before + rows // GROUP
        last = tl.minimum(before + last_row // GROUP + 1, max_blocks * BLOCK_TOKENS)
    else:  # every row sees what the last one sees
        positions = tl.zeros([1], tl.int32) + (context - 1)
        last = tl.minimum(context, max_blocks * BLOCK_TOKENS)
    first = tl.maximum(before + first_row // GROUP - window + 1, 0) if WINDOWED else 0
    keys, values = k_cache + kv_head * k_head, v_cache + kv_head * v_head
    key_scales = k_scales + kv_head * k_scale_head if FORM != "plain" else k_scales
    value_scales = v_scales + kv_head * v_scale_head if FORM != "plain" else v_scales
    table = block_tables + sequence * table_stride
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    for split in tl.range(first // _SPLIT, tl.cdiv(last, _SPLIT), disable_licm=True):  # pyright: ignore[reportGeneralTypeIssues]
        split_m, split_total, split_o = _attend(
            queries, positions, slopes, keys, values, table, num_blocks, k_block, k_token, v_block, v_token,
            tl.maximum(split * _SPLIT, first), tl.minimum((split + 1) * _SPLIT, last), scale, cap, window,
            key_scales, value_scales, k_scale_block, v_scale_block, k_scale_token, v_scale_token,
            HEAD_DIM, BLOCK_TOKENS, KEYS, CAPS, ALIBI, WINDOWED, FORM,
        )  # fmt: skip
        m, total, o = _merge(m, total, o, split_m, split_total, split_o)
    tl.store(out + base + offsets, narrow(_finish(total, o), out.dtype.element_ty), within)


@triton.jit(do_not_specialize=["tokens", "max_blocks", "table_stride", "num_blocks"])
def _decode(
    q, k_cache, v_cache, cu_seqlens, context_lens, block_tables, alibi_slopes, tokens, max_blocks, table_stride,
    num_blocks, k_block, k_head, k_token, v_block, v_head, v_token, scale, cap, window, states, outputs,
    k_scales, v_scales, k_scale_block, k_scale_head, v_scale_block, v_scale_head, k_scale_token, v_scale_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, CAPS: tl.constexpr, ALIBI: tl.constexpr, WINDOWED: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Grid: sequences of one query token * tiles of a kv head's ROWS heads, kv heads, splits. Causal or not, the token
    sees its whole context."""
    tiles: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    sequence = tl.program_id(0) // tiles
    split = tl.program_id(2)
    token = tl.load(cu_seqlens + sequence)
    context = tl.load(context_lens + sequence)
    first = tl.maximum(split * _SPLIT, context - window) if WINDOWED else split * _SPLIT
    last = tl.minimum(tl.minimum((split + 1) * _SPLIT, context), max_blocks * BLOCK_TOKENS)
    if (tl.load(cu_seqlens + sequence + 1) <= token) | (token >= tokens) | (first >= last):
        return
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    kv_head = tl.program_id(1).to(tl.int64)
    heads = kv_head * GROUP + rows
    num_heads = tl.num_programs(1) * GROUP
    columns = tl.arange(0, WIDTH)
    within = (rows < GROUP)[:, None] & _columns(columns, HEAD_DIM)
    offsets = (token * num_heads + heads)[:, None] * HEAD_DIM + columns[None]
    queries = tl.load(q + offsets, within, other=0.0)
    slopes = tl.load(alibi_slopes + heads, rows < GROUP, other=0.0) * _LOG2_E if ALIBI else 0.0
    positions = tl.zeros([ROWS], tl.int32) + (context - 1)
    key_scales = k_scales + kv_head * k_scale_head if FORM != "plain" else k_scales
    value_scales = v_scales + kv_head * v_scale_head if FORM != "plain" else v_scales
    m, total, o = _attend(
        queries, positions, slopes, k_cache + kv_head * k_head, v_cache + kv_head * v_head,
        block_tables + sequence * table_stride, num_blocks, k_block, k_token, v_block, v_token,
        first, last, scale, cap, window,
        key_scales, value_scales, k_scale_block, v_scale_block, k_scale_token, v_scale_token,
        HEAD_DIM, BLOCK_TOKENS, KEYS, CAPS, ALIBI, WINDOWED, FORM,
    )  # fmt: skip
    at = (sequence * num_heads + heads) * tl.num_programs(2) + split
    tl.store(states + 2 * at, m, rows < GROUP)
    tl.store(states + 2 * at + 1, total, rows < GROUP)
    tl.store(outputs + at[:, None] * HEAD_DIM + columns[None], o, within)


@triton.jit(do_not_specialize=["tokens", "max_blocks", "splits"])
def _reduce(
    states, outputs, cu_seqlens, context_lens, tokens, max_blocks, splits, window, out,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WIDTH: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid: sequences of one query token, heads."""
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tl.load(cu_seqlens + sequence)
    if (tl.load(cu_seqlens + sequence + 1) <= token) | (token >= tokens):
        return
    context = tl.load(context_lens + sequence)
    first = tl.maximum(context - window, 0) if WINDOWED else 0
    last = tl.minimum(context, max_blocks * BLOCK_TOKENS)
    row = tl.arange(0, 1)  # tensors of one row, for _merge
    columns = tl.arange(0, WIDTH)
    within = columns < HEAD_DIM
    begin = (sequence * tl.num_programs(1) + head) * splits
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    o = tl.zeros([1, WIDTH], tl.float32)
    for split in range(first // _SPLIT, tl.cdiv(last, _SPLIT)):
        at = begin + split + row
        split_m, split_total = tl.load(states + 2 * at), tl.load(states + 2 * at + 1)
        split_o = tl.load(outputs + at[:, None] * HEAD_DIM + columns[None], within[None], other=0.0)
        m, total, o = _merge(m, total, o, split_m, split_total, split_o)
    offsets = (token * tl.num_programs(1) + head + row)[:, None] * HEAD_DIM + columns[None]
    tl.store(out + offsets, narrow(_finish(total, o), out.dtype.element_ty), within[None])


def paged_attention(
    q: Tensor,
    cache: KvPlanes,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None,
    causal: bool,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    """With a workspace: of one query token a sequence at most. Without: of any number."""
    tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_tokens, _ = cache.keys.shape
    seqs, max_blocks = block_tables.shape
    group, width, window = num_heads // num_kv_heads, _width(head_dim), sliding_window or 0
    tiles = _tiles(_capability(q), q.dtype, width, cache.form, decode=workspace is not None)
    # scores are exponents of 2; before a cap they are those of its tanh
    scale, cap = (2 * scale / soft_cap, soft_cap) if soft_cap else (scale, 0.0)
    arguments = (
        q, cache.keys, cache.values, cu_seqlens, context_lens, block_tables, alibi_slopes, tokens, max_blocks,
        block_tables.stride(0), num_blocks, *cache.keys.stride()[:3], *cache.values.stride()[:3],
        scale * _LOG2_E.value, cap * _LOG2_E.value, window,
    )  # fmt: skip
    shapes = {"HEAD_DIM": head_dim, "BLOCK_TOKENS": block_tokens, "WIDTH": width, "WINDOWED": bool(window)}
    constants = {
        **shapes,
        "GROUP": group,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "CAPS": soft_cap is not None,
        "ALIBI": alibi_slopes is not None,
        "FORM": cache.form,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    if workspace is None:
        grid = (tokens * group // tiles.rows + seqs if seqs else 0, num_kv_heads)
        constants |= {"CAUSAL": causal, "maxnreg": _max_registers(causal)}
        launch(_prefill, grid, *arguments, out, seqs, *scale_arguments(cache), **constants)
        return
    splits = triton.cdiv(max_blocks * block_tokens, SPLIT_TOKENS)
    partials = seqs * num_heads * splits
    outputs, states = workspace[: partials * head_dim], workspace[partials * head_dim :]
    grid = (seqs * triton.cdiv(group, tiles.rows), num_kv_heads, splits)
    launch(_decode, grid, *arguments, states, outputs, *scale_arguments(cache), **constants)
    arguments = (states, outputs, cu_seqlens, context_lens, tokens, max_blocks, splits, window, out)
    launch(_reduce, (seqs, num_heads), *arguments, **shapes, num_warps=_reduce_warps(width))


@dataclass(frozen=True)
class _Tiles:
    """rows of queries, and keys."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def _tiles(capability: int, dtype: torch.dtype, width: int, form: str, *, decode: bool) -> _Tiles:
    """Reasoned, not measured: as many as fit into registers beside a row's total.

    A row's bits depend on `keys`, and on how the threads that share a row divide its keys: both must be the same in
    decode as in prefill. On sm_90 every row lies in one warp, whatever the rows of a tile; elsewhere both use one tile.
    """
    if dtype == torch.float32:  # no matrix units
        if capability >= 90:
            # integers that are to become floats need registers of their own
            return _Tiles(16, 16, 4, 2) if form == "plain" else _Tiles(16, 16, 8, 1)
        return _Tiles(32, 16, 8, 1) if width <= 64 else _Tiles(16, 16, 8, 2)
    if 100 <= capability < 110:
        return _Tiles(128, 64, 8, 2) if width <= 128 else _Tiles(64, 64, 8, 2)
    if capability == 90:
        if width > 128:
            return _Tiles(64, 32, 8, 3)
        return _Tiles(64, 64, 4, 3) if decode else _Tiles(128, 64, 8, 3)
    # mma.sync takes its operands from registers; and GPUs of this kind have less shared memory, down to 99 KiB
    if width <= 64:
        return _Tiles(128, 64 if form == "plain" else 32, 8, 3)
    return _Tiles(64, 32, 8, 3) if width == 128 else _Tiles(32, 32, 8, 2)


def variants(capability: int) -> list[Variant]:
    """Groups are SmolLM2's for a head_dim of 64, Llama-3.1-8B's for the others.

    Caps are Gemma's, windows Gemma's, Mistral's and Phi-3's, slopes BLOOM's; dense ones are for encoders and UNets.
    """
    plain, windowed, capped, alibi, dense = (), ("windowed",), ("capped",), ("alibi",), ("dense",)
    found = []
    for head_dim, options in {
        40: (dense,),
        64: (plain, windowed, alibi, dense),
        80: (plain, dense),
        96: (plain, windowed),
        128: (plain, windowed, capped, windowed + capped, alibi),
        160: (dense,),
        256: (plain, windowed, capped, windowed + capped),
    }.items():
        for option in options:
            found += _variants(capability, "bf16", head_dim, option)
    for head_dim in (64, 128):
        for option in (plain, windowed, dense):
            found += _variants(capability, "fp32", head_dim, option)
        found += _variants(capability, "fp16", head_dim, plain)
        for element in ("bf16", "fp16", "fp32"):
            for form in GREATEST:
                found += _variants(capability, element, head_dim, plain, form)
    return found


def _variants(
    capability: int, element: str, head_dim: int, options: tuple[str, ...], form: str = "plain"
) -> list[Variant]:
    """Prefill, decode, and where it is not that of another, _reduce. Of dense ones prefill, which computes them all."""
    windowed, capped, alibi, dense = (option in options for option in ("windowed", "capped", "alibi", "dense"))
    width = _width(head_dim)
    name = " ".join((element, str(head_dim), *options, *(() if form == "plain" else ("of", form))))
    scales, scale_constants = scale_types(form)
    lengths = {"cu_seqlens": "*i32", "context_lens": "*i32"}
    strides = ("k_block", "k_head", "k_token", "v_block", "v_head", "v_token")
    arguments = {
        "q": f"*{element}",
        **dict.fromkeys(("k_cache", "v_cache"), f"*{element}" if form == "plain" else "*i8"),
        **lengths,
        "block_tables": "*i32",
        "alibi_slopes": "*fp32",
        **dict.fromkeys(("tokens", "max_blocks", "table_stride", "num_blocks", *strides), "i32"),
        "scale": "fp32",
        "cap": "fp32",
        "window": "i32",
    }
    partials = {"states": "*fp32", "outputs": "*fp32"}
    # heads of a dense row lie side by side
    aligned = tuple(stride for stride in strides if not (dense and head_dim % 16 and stride in ("k_head", "v_head")))
    shapes = {"HEAD_DIM": head_dim, "BLOCK_TOKENS": 1 if dense else 16, "WIDTH": width, "WINDOWED": windowed}
    found = []
    for decodes in (False,) if dense else (False, True):
        dtype = torch.float32 if element == "fp32" else torch.bfloat16
        tiles = _tiles(capability, dtype, width, form, decode=decodes)
        found.append(
            Variant(
                name=f"attention {'decode' if decodes else 'prefill'} {name}",
                kernel=_decode if decodes else _prefill,
                arguments={**arguments, **(partials if decodes else {"out": f"*{element}", "seqs": "i32"}), **scales},
                constants={
                    **shapes,
                    "GROUP": 1 if dense else 3 if head_dim == 64 else 4,
                    "ROWS": tiles.rows,
                    "KEYS": tiles.keys,
                    "CAPS": capped,
                    "ALIBI": alibi,
                    "FORM": form,
                    **({} if decodes else {"CAUSAL": not dense}),
                    **scale_constants,
                },
                aligned=(*aligned, *scales),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                max_registers=_max_registers(not dense),
                matrix=element != "fp32",
            )
        )
    if not capped and not alibi and not dense and form == "plain":
        numbers = dict.fromkeys(("tokens", "max_blocks", "splits", "window"), "i32")
        found.append(
            Variant(
                name=f"attention reduce {name}",
                kernel=_reduce,
                arguments={**partials, **lengths, **numbers, "out": f"*{element}"},
                constants=shapes,
                num_warps=_reduce_warps(width),
            )
        )
    return found


def _max_registers(causal: bool) -> int | None:
    """Of a thread: where it is not causal, all that it can have. Without a bound ptxas spills some of them there, to
    have room for another program beside this one."""
    return None if causal else 255


def _width(head_dim: int) -> int:
    """Of tiles: a power of 2, and as long as matrix units take them."""
    return max(triton.next_power_of_2(head_dim), 16)


def _reduce_warps(width: int) -> int:
    return max(width // 64, 1)


def _capability(tensor: Tensor) -> int:
    """90 for Triton's interpreter."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
