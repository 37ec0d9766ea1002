"""`make bench-ops`: each CPU op at the default model's shapes, against what the machine could do.

    python -m benchmarks.ops [--threads N]

The floor of an op is the longer of two times: its bytes at the memory's read rate, and its multiply-adds at the rate of
a large bfloat16 matmul. Both rates are measured first, as the best of several runs of torch: the maximum of 256 MiB,
and 2,048 x 2,048 by as many. The fraction is floor / time. Linears and attention run as all layers of a model, over
other weights and blocks each time as in a step, so that no cache holds them; what a cache can hold may beat its floor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table, box

from kernels.activation import gated
from kernels.attention import paged_attention
from kernels.cpu.library import record
from kernels.experts import ExpertWeights
from kernels.kv_format import KvFormat, KvPlanes
from kernels.linear import LinearWeight, linear
from kernels.moe import grouped_linear, route
from kernels.quantization import Quantization
from kernels.rms_norm import add_rms_norm
from kernels.sampling import How, draw, token_uniforms
from kernels.transfer import transfer_tokens

# the default model
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 576, 1536, 30, 49152
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 9, 3, 64, 16
SHAPES = (
    ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    (HIDDEN, HEADS * HEAD_DIM),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
# and sixteen experts beside it, of which a row goes to two
EXPERTS, CHOICES, EXPERT_WIDTH, EXPERT_LAYERS = 16, 2, 512, 8
# of the layers' linears, and of the output layer
QUANTIZATIONS = {
    "bfloat16": (None, None),
    "int8": (Quantization(8), Quantization(8)),
    "int8, int8 rows": (Quantization(8, dynamic=True), Quantization(8)),
    "int4": (Quantization(4, 32, symmetric=False), Quantization(8)),
    "fp8": (Quantization(8, floating=True), Quantization(8)),
    "fp6": (Quantization(6, floating=True), Quantization(8)),
}
RUNS = 15


class Op(NamedTuple):
    """What is timed, and what it must at least read, in bytes, and compute, in floating-point operations."""

    name: str
    run: Callable[[], object]
    num_bytes: float
    flops: float


def linears() -> Iterator[Op]:
    """Every linear of a step, the output layer's included; and the output layer alone."""
    x = {width: torch.randn(512, width).bfloat16() for width in (HIDDEN, INTERMEDIATE)}
    widths = {outputs for outputs, _ in SHAPES} | {VOCABULARY}
    y = {width: torch.empty(512 if width < VOCABULARY else 32, width, dtype=torch.bfloat16) for width in widths}

    def of(what: str, weights: Sequence[LinearWeight], rows: int) -> Op:
        with record() as replay:
            for weight in weights:
                linear(x[weight.in_features][:rows], weight, out=y[weight.out_features][:rows])
        flops = sum(2 * rows * weight.in_features * weight.out_features for weight in weights)
        return Op(f"{what}, {rows} rows", replay, sum(weight.num_bytes for weight in weights), flops)

    heads: dict[Quantization | None, LinearWeight] = {}
    for name, (quantization, of_head) in QUANTIZATIONS.items():
        weights = [LinearWeight(torch.randn(s).bfloat16(), None, quantization) for _ in range(LAYERS) for s in SHAPES]
        head = heads.get(of_head) or LinearWeight(torch.randn(VOCABULARY, HIDDEN).bfloat16(), None, of_head)
        for rows in (1, 8, 32):
            yield of(f"linears of a step, {name}", [*weights, head], rows)
        yield of(f"linears of a chunk, {name}", weights, 512)
        if of_head not in heads:
            for rows in (1, 8, 32):
                yield of(f"output layer, {name}", [head], rows)
        heads[of_head] = head


def mixtures() -> Iterator[Op]:
    """The linears of experts. The floor reads those that a row goes to."""
    for name, (quantization, _) in QUANTIZATIONS.items():
        first, second = (
            [
                ExpertWeights((torch.randn(shape).bfloat16() for _ in range(EXPERTS)), EXPERTS, quantization)
                for _ in range(EXPERT_LAYERS)
            ]
            for shape in ((2 * EXPERT_WIDTH, HIDDEN), (HIDDEN, EXPERT_WIDTH))
        )
        for rows in (1, 8, 32, 512):
            experts = torch.rand(rows, EXPERTS).argsort(1)[:, :CHOICES].int().contiguous()
            routing, factors = route(experts, EXPERTS), torch.rand(rows, CHOICES)
            x, inner = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(rows * CHOICES, EXPERT_WIDTH).bfloat16()
            y, out = inner.new_empty(rows * CHOICES, 2 * EXPERT_WIDTH), torch.empty(rows * CHOICES, HIDDEN)
            with record() as replay:
                for up, down in zip(first, second, strict=True):
                    grouped_linear(x, up, routing, out=y)
                    grouped_linear(inner, down, routing, pair_weights=factors, out=out)
            # the replay holds addresses, the operation what lies there
            keep = (routing, factors, x, inner, y, out)
            used = int((routing.counts > 0).sum()) / EXPERTS
            num_bytes = sum(weight.num_bytes for weight in (*first, *second)) * used
            flops = EXPERT_LAYERS * 2 * rows * CHOICES * 3 * EXPERT_WIDTH * HIDDEN
            yield Op(f"experts, {name}, {rows} rows", lambda run=replay, keep=keep: run(), num_bytes, flops)


def attentions() -> Iterator[Op]:
    """All layers of a pool as a worker has it: decode steps of some sequences, and a prompt in one piece."""
    for sequences, tokens, length in ((1, 1, 512), (8, 1, 512), (32, 1, 128), (1, 512, 512), (1, 1500, 1500)):
        blocks = -(-length // BLOCK_TOKENS)
        pool = torch.randn(sequences * blocks, LAYERS, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM).bfloat16()
        q = torch.randn(sequences * tokens, HEADS, HEAD_DIM).bfloat16()
        out = torch.empty(sequences * tokens, HEADS * HEAD_DIM, dtype=torch.bfloat16)
        lengths = torch.full((sequences,), length, dtype=torch.int32)
        starts = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
        table = torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
        with record() as replay:
            for layer in range(LAYERS):
                cache = KvPlanes(pool[:, layer, 0], pool[:, layer, 1])
                paged_attention(q, cache, starts, lengths, table, HEAD_DIM**-0.5, out=out)
        # the replay holds addresses, the operation what lies there
        keep = (pool, q, out, lengths, starts, table)
        seen = tokens * (2 * length - tokens + 1) / 2
        name = f"{sequences} sequences of {length} tokens" if tokens == 1 else f"prefill of {tokens} tokens"
        flops = LAYERS * 4 * sequences * seen * HEADS * HEAD_DIM
        yield Op(f"attention, {name}", lambda run=replay, keep=keep: run(), pool.numel() * 2, flops)


def sampling() -> Iterator[Op]:
    """The next tokens of 32 rows. The floor is one reading of the logits."""
    logits = torch.randn(32, VOCABULARY) * 4
    uniforms = token_uniforms([1] * 32, range(32), [0] * 32)
    for name, how in (("greedy", How(0)), ("temperature", How(0.7)), ("temperature, top-k, top-p", How(0.7, 50, 0.9))):
        run = partial(draw, logits, [how] * 32, uniforms)
        yield Op(f"sampling, 32 rows, {name}", run, logits.numel() * 4, 0)


def small_ops() -> Iterator[Op]:
    """One layer's, for a chunk of 512 tokens, in the cache."""
    gate_up, x, residual = (torch.randn(512, width).bfloat16() for width in (2 * INTERMEDIATE, HIDDEN, HIDDEN))
    weight = torch.randn(HIDDEN).bfloat16()
    yield Op("gated SiLU, 512 rows", lambda: gated(gate_up, "silu"), gate_up.numel() * 3, 0)
    yield Op("RMSNorm with residual, 512 rows", lambda: add_rms_norm(x, residual, weight, 1e-5), x.numel() * 8, 0)


def transfers() -> Iterator[Op]:
    """2,048 tokens to another worker's blocks, on one thread. The floor has what is written as well."""
    tokens, block_tokens = 2048, 2 * BLOCK_TOKENS
    pairs = [("bfloat16", to) for to in ("bfloat16", "float32", "int8", "fp8")] + [("int8", "bfloat16")]
    for from_dtype, to_dtype in pairs:
        source_format = KvFormat(from_dtype, LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS)
        target_format = KvFormat(to_dtype, LAYERS, KV_HEADS, HEAD_DIM, block_tokens)
        source = torch.ones(tokens // BLOCK_TOKENS, source_format.block_bytes, dtype=torch.uint8)
        target = torch.zeros(tokens // block_tokens, target_format.block_bytes, dtype=torch.uint8)
        tables = [torch.randperm(len(pool), dtype=torch.int32) for pool in (source, target)]
        run = partial(transfer_tokens, source, source_format, tables[0], 0, target, target_format, tables[1], 0, tokens)
        yield Op(f"transfer, {from_dtype} to {to_dtype}", run, source.numel() + target.numel(), 0)


def times_s(run: Callable[[], object], runs: int = RUNS) -> list[float]:
    """The times of some runs, ascending; the first, which loads, is left out."""
    times: list[float] = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def ceilings() -> tuple[float, float]:
    """Bytes a second that are read, and floating-point operations a second of a bfloat16 matmul."""
    numbers = torch.ones(1 << 26)
    read_s = times_s(numbers.max)[0]
    square = torch.randn(2048, 2048).bfloat16()
    matmul_s = times_s(lambda: square @ square)[0]
    return numbers.numel() * 4 / read_s, 2 * 2048**3 / matmul_s


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    torch.set_num_threads(parser.parse_args(argv).threads)
    torch.manual_seed(0)
    read, compute = ceilings()
    title = f"{torch.get_num_threads()} threads; {read / 1e9:.0f} GB/s, {compute / 1e9:.0f} GFLOP/s"
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for column in ("op", "time ms", "floor ms", "fraction", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for ops in (linears(), mixtures(), attentions(), sampling(), small_ops(), transfers()):
        for op in ops:
            took_s = statistics.median(times_s(op.run))
            floor_s = max(op.num_bytes / read, op.flops / compute)
            figures = (
                took_s * 1e3,
                floor_s * 1e3,
                floor_s / took_s,
                op.num_bytes / took_s / 1e9,
                op.flops / took_s / 1e9,
            )
            table.add_row(op.name, *(f"{figure:.3g}" for figure in figures))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
