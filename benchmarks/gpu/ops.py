"""Each op at a model's shapes, against the ceilings of the same run: a large copy, and a large matrix product.

The floor of an op is the longer of two times: its bytes at the copy's rate (bytes read and written), and its
floating-point operations at the matrix product's. Its share is floor / time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.results import COPY, MATMUL, Figure, Results
from benchmarks.gpu.shapes import Config, Sizes, device
from benchmarks.gpu.timing import Call, call_s, copies_of
from kernels.activation import gated
from kernels.attention import attention_workspace, paged_attention
from kernels.kv_format import KvPlanes
from kernels.linear import LinearWeight, linear
from kernels.quantization import Quantization
from kernels.rms_norm import add_rms_norm
from kernels.rope import rope_and_cache
from kernels.sampling import draw_tokens

PART = "ops"
_COMPILERS = 12  # processes that compile kernels before any is timed
_POOL_LAYERS = 4  # a block's keys and values of a layer do not lie beside the next block's


class Work(NamedTuple):
    """What is timed. make: so many calls, each on memory of its own. num_bytes: what a call has to read and write."""

    name: str
    make: Callable[[int], list[Call]]
    num_bytes: float
    flops: float


class Op(NamedTuple):
    """Works that follow each other, as one figure."""

    name: str
    works: tuple[Work, ...]
    bar: float | None = None


def run(results: Results, sizes: Sizes) -> None:
    """Adds every figure."""
    ceilings(results, sizes)
    if torch.cuda.is_available():
        _compile(sizes)
    for op in ops(sizes.model, sizes):
        measure(results, op, sizes)


def ceilings(results: Results, sizes: Sizes) -> tuple[float, float]:
    """(bytes a second of a large copy, floating-point operations a second of a large bfloat16 product), measured once a
    run."""
    copy, matmul = (results.find(PART, name) for name in ("copy", "matmul"))
    if copy is None or copy.value is None or matmul is None or matmul.value is None:
        source = torch.randn(sizes.copied_bytes // 4, device=device())
        target = torch.empty_like(source)
        seconds = call_s([partial(target.copy_, source)], runs=sizes.runs, at_least=1)
        rate, note = 2 * sizes.copied_bytes / seconds, f"{sizes.copied_bytes >> 20} MiB read, as many written"
        results.add(PART, Figure("copy", rate / 1e9, "GB/s", note=note, seconds=seconds))
        del source, target
        n = sizes.matmul
        a, b, out = (_normal(n, n) for _ in range(3))
        seconds = call_s([partial(torch.mm, a, b, out=out)], runs=sizes.runs, at_least=sizes.calls)
        rate, note = 2 * n**3 / seconds, f"torch.mm, bfloat16, {n} x {n} x {n}"
        results.add(PART, Figure("matmul", rate / 1e12, "TFLOP/s", note=note, seconds=seconds))
        return ceilings(results, sizes)
    return copy.value * 1e9, matmul.value * 1e12


def measure(results: Results, op: Op, sizes: Sizes) -> None:
    """Adds the op's share of the ceiling that bounds it."""
    copy, matmul = ceilings(results, sizes)
    num_bytes, flops = sum(work.num_bytes for work in op.works), sum(work.flops for work in op.works)
    unit = COPY if num_bytes / copy >= flops / matmul else MATMUL
    with results.attempt(PART, op.name, unit, op.bar):
        times_s = []
        floors_s = [max(work.num_bytes / copy, work.flops / matmul) for work in op.works]
        for work in op.works:
            copies = copies_of(work.num_bytes)
            times_s.append(call_s(work.make(copies), runs=sizes.runs, at_least=sizes.calls))
        shares = [f"{work.name} {floor / t:.0%}" for work, floor, t in zip(op.works, floors_s, times_s, strict=True)]
        seconds = sum(times_s)
        note = f"{seconds * 1e3:.4g} ms" + (f": {', '.join(shares)}" if len(shares) > 1 else "")
        results.add(PART, Figure(op.name, sum(floors_s) / seconds, unit, op.bar, note, seconds))


def ops(model: Config, sizes: Sizes, *, quantized: bool = True) -> Iterator[Op]:
    """All that are timed. quantized: with linears of few bits."""
    yield from _attentions(model, sizes)
    yield from _row_ops(model, sizes)
    yield from _sampling(model, sizes)
    yield from _linears(model, sizes, quantized)


def _linears(model: Config, sizes: Sizes, quantized: bool) -> Iterator[Op]:
    """The four of a layer, and the output layer. cuBLAS is what a row's bits are not its own with."""
    kinds: dict[str, Quantization | None] = {
        "Triton": None,
        "cuBLAS": None,
        "int8": Quantization(8),
        f"int4, groups of {sizes.int4_group}": Quantization(4, sizes.int4_group),
        "fp8": Quantization(8, floating=True),
        "fp6": Quantization(6, floating=True),
        "int8, dynamic": Quantization(8, dynamic=True),
    }
    shapes = layer_shapes(model)
    head = {"output layer": (model["vocab_size"], model["hidden_size"])}
    for rows in (*sizes.few_rows, sizes.many_rows):
        for kind, quantization in kinds.items():
            if quantization is not None and (rows == sizes.many_rows or not quantized):
                continue
            works = [_linear(name, *shape, rows, kind, quantization) for name, shape in shapes.items()]
            yield Op(f"a layer's linears, {rows} rows, {kind}", tuple(works))
    for rows in sizes.few_rows:
        for kind in ("Triton", "cuBLAS", "int8")[: 3 if quantized else 2]:
            works = [_linear(name, *shape, rows, kind, kinds[kind]) for name, shape in head.items()]
            yield Op(f"output layer, {rows} rows, {kind}", tuple(works))


def _linear(
    name: str, out_features: int, in_features: int, rows: int, kind: str, quantization: Quantization | None
) -> Work:
    """Logits are float32, all else is bfloat16."""
    dtype = torch.float32 if name == "output layer" else torch.bfloat16

    def make(copies: int) -> list[Call]:
        calls: list[Call] = []
        for _ in range(copies):
            x, values = _normal(rows, in_features), _normal(out_features, in_features) / in_features**0.5
            out = torch.empty(rows, out_features, dtype=dtype, device=device())
            if kind != "cuBLAS":
                calls.append(partial(linear, x, LinearWeight(values, None, quantization), out=out))
            elif dtype == torch.bfloat16:
                calls.append(partial(torch.mm, x, values.t(), out=out))
            else:
                calls.append(partial(linear, x, LinearWeight(values), out=out, own_bits=False))
        return calls

    weight_bytes = 2.0 * out_features * in_features
    if quantization is not None:
        groups = in_features // quantization.group if quantization.group else 1
        weight_bytes = out_features * (in_features * quantization.bits / 8 + 4 * groups)
    num_bytes = weight_bytes + rows * (2 * in_features + dtype.itemsize * out_features)
    return Work(name, make, num_bytes, 2 * rows * in_features * out_features)


def _attentions(model: Config, sizes: Sizes) -> Iterator[Op]:
    """A decode step of many sequences, and a prompt in one piece."""
    sequences, tokens = sizes.attention
    heads, kv_heads, head_dim = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
    kv_bytes = 2 * 2 * kv_heads * head_dim  # of a token
    work = Work("", partial(_attention, model, sizes, sequences, 1, tokens), sequences * tokens * kv_bytes, 0)
    yield Op(f"decode attention, {sequences} sequences of {tokens} tokens", (work,), bar=0.85)
    rows = sizes.many_rows
    num_bytes, flops = rows * (kv_bytes + 4 * heads * head_dim), 4 * heads * head_dim * rows * (rows + 1) / 2
    work = Work("", partial(_attention, model, sizes, 1, rows, rows), num_bytes, flops)
    yield Op(f"prefill attention, {rows} tokens", (work,))


def _attention(model: Config, sizes: Sizes, sequences: int, queries: int, tokens: int, copies: int) -> list[Call]:
    """Of each layer of a pool like an engine's."""
    heads, kv_heads, head_dim = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
    blocks = -(-tokens // sizes.block_tokens)
    layers = max(copies, _POOL_LAYERS)
    pool = _normal(sequences * blocks, layers, 2, kv_heads, sizes.block_tokens, head_dim)
    q = _normal(sequences * queries, heads, head_dim)
    starts = _integers(range(0, sequences * queries + 1, queries))
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device=device())
    tables = torch.randperm(sequences * blocks).int().to(device()).view(sequences, blocks)
    workspace = None
    if queries == 1:
        size = attention_workspace(sequences, heads, head_dim, blocks * sizes.block_tokens)
        workspace = torch.empty(size, device=device())
    out = torch.empty(sequences * queries, heads * head_dim, dtype=q.dtype, device=device())

    def call(layer: int) -> Tensor:
        return paged_attention(
            q, KvPlanes(pool[:, layer, 0], pool[:, layer, 1]), starts, lengths, tables, head_dim**-0.5,
            max_query_len=queries, workspace=workspace, out=out,
        )  # fmt: skip

    return [partial(call, layer) for layer in range(layers)]


def _row_ops(model: Config, sizes: Sizes) -> Iterator[Op]:
    """What is computed row by row."""
    hidden, intermediate = model["hidden_size"], model["intermediate_size"]
    heads, kv_heads, head_dim = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
    qkv = (heads + 2 * kv_heads) * head_dim
    for rows in (sizes.few_rows[-1], sizes.many_rows):
        works = {
            "RMSNorm with residual": Work("", partial(_norm, rows, hidden), 8 * rows * hidden, 0),
            "rope and cache": Work("", partial(_rope, model, sizes, rows), 4 * rows * qkv + 4 * rows * head_dim, 0),
            "gated SiLU": Work("", partial(_silu, rows, intermediate), 6 * rows * intermediate, 0),
        }
        yield from (Op(f"{name}, {rows} rows", (work,)) for name, work in works.items())


def _norm(rows: int, width: int, copies: int) -> list[Call]:
    weight = torch.ones(width, dtype=torch.bfloat16, device=device())

    def make() -> Call:
        x, residual, out = (_normal(rows, width) for _ in range(3))
        return lambda: add_rms_norm(x, residual, weight, 1e-5, out=out, residual_out=residual)

    return [make() for _ in range(copies)]


def _rope(model: Config, sizes: Sizes, rows: int, copies: int) -> list[Call]:
    heads, kv_heads, head_dim = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
    blocks = -(-rows // sizes.block_tokens)
    cos_sin = torch.rand(rows, head_dim, device=device())
    positions = _integers(range(rows))
    slots = torch.arange(rows, device=device())

    def make() -> Call:
        qkv = _normal(rows, (heads + 2 * kv_heads) * head_dim)
        pool = _normal(blocks, 2, kv_heads, sizes.block_tokens, head_dim)
        out = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=device())
        cache = KvPlanes(pool[:, 0], pool[:, 1])
        return partial(rope_and_cache, qkv, cos_sin, positions, slots, cache, heads, kv_heads, out=out)

    return [make() for _ in range(copies)]


def _silu(rows: int, width: int, copies: int) -> list[Call]:
    def make() -> Call:
        out = torch.empty(rows, width, dtype=torch.bfloat16, device=device())
        return partial(gated, _normal(rows, 2 * width), "silu", out=out)

    return [make() for _ in range(copies)]


def _sampling(model: Config, sizes: Sizes) -> Iterator[Op]:
    """Of each row the next token, from random logits; the floor is one reading of them."""
    vocab = model["vocab_size"]
    settings = {"greedy": (0.0, 0.0, 1.0, 0.0), "top-p": (0.8, 0.0, 0.95, 0.0)}
    for rows in (sizes.few_rows[0], sizes.few_rows[-1]):
        for name, how in settings.items():
            work = Work("", partial(_draw, rows, vocab, how), 4 * rows * vocab, 0)
            yield Op(f"sampling, {rows} rows, {name}", (work,))


def _draw(rows: int, vocab: int, how: tuple[float, ...], copies: int) -> list[Call]:
    settings = torch.tensor([how] * rows, dtype=torch.float64, device=device())
    seeds = torch.arange(rows, device=device())
    zeros = torch.zeros(rows, dtype=torch.int32, device=device())
    tokens = torch.empty(rows, dtype=torch.int64, device=device())

    def make() -> Call:
        logits = 4 * torch.randn(rows, vocab, device=device())
        return partial(draw_tokens, logits, settings, seeds, zeros, zeros, tokens)

    return [make() for _ in range(copies)]


def layer_shapes(model: Config) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's linears."""
    hidden, head_dim = model["hidden_size"], model["head_dim"]
    q, kv = model["num_attention_heads"] * head_dim, model["num_key_value_heads"] * head_dim
    return {
        "qkv": (q + 2 * kv, hidden),
        "output": (hidden, q),
        "gate_up": (2 * model["intermediate_size"], hidden),
        "down": (hidden, model["intermediate_size"]),
    }


def _compile(sizes: Sizes) -> None:
    """Has every kernel compiled, by several processes, into the cache of compiled kernels that all of a run share.

    With those of the models that are served: a worker would compile one after another.
    """
    # new processes: the device cannot be used in a copy of this one
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(_COMPILERS, len(os.sched_getaffinity(0))), mp_context=context) as pool:
            for failed in pool.map(partial(_compile_work, sizes), range(len(_works(sizes)))):
                if failed:
                    print(failed, flush=True)
    except BrokenProcessPool as error:
        print(f"kernels are compiled as they are used: {error}", flush=True)


def _works(sizes: Sizes) -> list[Work]:
    """Those with kernels of ours, of each width of a model once."""
    served = {model["hidden_size"]: model for model in sizes.served.values()}
    served.pop(sizes.model["hidden_size"], None)
    wanted = [*ops(sizes.model, sizes), *(op for model in served.values() for op in ops(model, sizes, quantized=False))]
    return [work for op in wanted for work in op.works if "cuBLAS" not in op.name]


def _compile_work(sizes: Sizes, index: int) -> str:
    """What went wrong, or nothing: the op's own figure will say it again."""
    work = _works(sizes)[index]
    try:
        work.make(1)[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{work.name}: {error}"
    finally:
        torch.cuda.empty_cache()
    return ""


def _normal(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device()).normal_()


def _integers(numbers: range) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device())
