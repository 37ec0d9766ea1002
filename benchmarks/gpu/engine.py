"""The engine in process, with random weights of a model's shape: decode steps, prompts, and what capturing them takes.

A step has to read every linear's weight and its sequences' keys and values; its share is of the copy's rate. A prompt
of T tokens computes, of the products alone,

    2 T (qkv + output + gate and up + down) + 4 T (T + 1) / 2 * heads * head_dim    in each layer,
    2 hidden * vocab                                                               for its last token's logits

where of the last layer's output, gate and up, and down only the last token's row is computed; its share is of the
large matrix product's rate.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ops import ceilings, layer_shapes
from benchmarks.gpu.results import COPY, MATMUL, Figure, Results
from benchmarks.gpu.shapes import Config, RandomCheckpoint, Sizes, device
from benchmarks.gpu.timing import host_s
from kernels.linear import LinearWeight
from kernels.quantization import Quantization
from shared.batch import BatchEntry
from shared.config import load_config
from shared.engine import Engine, EnginePlan
from shared.kv_cache import KvLayout
from shared.model_files import ModelFiles, Weights
from shared.models.loading import load_weights
from shared.models.weights import ModelWeights
from shared.penalties import SampleRow
from shared.policies.table import architecture_of
from shared.sampling_params import SamplingParams

PART = "engine"
_GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)
_STEP_BARS = (0.85, 0.75)  # of the two batches


def run(results: Results, sizes: Sizes) -> None:
    """Adds every figure."""
    ceilings(results, sizes)
    plan, weights = make_plan(sizes), make_weights(sizes.model)
    one, many = sizes.batches
    with opened(plan, weights) as engine:
        _capture(results, engine)
        for batch, bar in zip(sizes.batches, _STEP_BARS, strict=True):
            _step(results, _step_name(batch), engine, weights, batch, sizes, bar)
        _prefill(results, f"prefill, {sizes.many_rows} tokens", engine, sizes, bar=0.65)
        for batch in sizes.generate[0]:
            _generate(results, engine, batch, sizes)
    with opened(dataclasses.replace(plan, enable_cuda_graph=False), weights) as engine:
        _op_by_op(results, engine, one, sizes, bar=3.0)
        _op_by_op(results, engine, many, sizes, bar=None)
    with opened(dataclasses.replace(plan, deterministic=False), weights) as engine:
        for batch in sizes.batches:
            _step(results, f"{_step_name(batch)}, cuBLAS", engine, weights, batch, sizes)
        _prefill(results, f"prefill, {sizes.many_rows} tokens, cuBLAS", engine, sizes)
    with opened(dataclasses.replace(plan, max_context=sizes.long_context), weights) as engine:
        name = f"{_step_name(many)}, tables of {sizes.long_context} tokens"
        _step(results, name, engine, weights, many, sizes)
    for form, quantization in (("int8", Quantization(8)), ("fp8", Quantization(8, floating=True))):
        _quantized(results, form, quantization, plan, weights, sizes)


def make_plan(sizes: Sizes) -> EnginePlan:
    """bfloat16, deterministic, with graphs; room for the largest batch at its context."""
    batch, context = sizes.batches[1], max(sizes.context, sizes.generate[1] + sizes.generate[2])
    num_blocks = 1 + max(batch * -(-context // sizes.block_tokens), -(-sizes.many_rows // sizes.block_tokens))
    values = {
        "device": device(),
        "dtype": "bfloat16",
        "block_tokens": sizes.block_tokens,
        "max_context": sizes.max_context,
        "decode": {"num_blocks": num_blocks, "max_running": batch},
    }
    config = load_config(None, values)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(sizes.model)))
        files = ModelFiles("random", Path(folder), Weights("safetensors", ()), "0" * 64)
        return EnginePlan.of(config, config.decode, files)


def make_weights(model: Config) -> ModelWeights:
    """Random ones, on the device."""
    checkpoint = RandomCheckpoint(model, device())
    return load_weights(architecture_of(model), checkpoint, dtype=torch.bfloat16, device=device())


def prefill_s(engine: Engine, tokens: int, sizes: Sizes) -> float:
    """Seconds of a prompt in one piece, with its way to the device, to the logits of its last token."""
    [table] = _tables(engine, 1, tokens)
    entry = BatchEntry(_tokens(engine, tokens), 0, table)
    engine.forward([entry])
    return statistics.median(host_s(lambda: engine.forward([entry])) for _ in range(sizes.runs))


def generate(engine: Engine, batch: int, prompt_tokens: int, new_tokens: int) -> None:
    """Random prompts, and so many tokens of each, greedily. Prompts of up to 4,096 tokens are computed together."""
    together = max(4096 // prompt_tokens, 1)
    prompts = [_tokens(engine, prompt_tokens) for _ in range(batch)]
    tables = _tables(engine, batch, prompt_tokens + new_tokens)
    last: list[int] = []
    for first in range(0, batch, together):
        rows = range(first, min(first + together, batch))
        logits = engine.forward([BatchEntry(prompts[row], 0, tables[row]) for row in rows])
        last += logits.argmax(1).tolist()
    for position in range(new_tokens - 1):
        entries = [BatchEntry([last[row]], prompt_tokens + position, tables[row]) for row in range(batch)]
        last = _drawn(engine, entries, position + 1)


@contextmanager
def opened(plan: EnginePlan, weights: ModelWeights) -> Iterator[Engine]:
    """Keys and values that are no zeros: a device multiplies those faster."""
    engine = Engine(plan, weights=weights)
    try:
        plan.layout.format.elements(engine.kv.pool).normal_()
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _capture(results: Results, engine: Engine) -> None:
    """The first time kernels are loaded too, and compiled where the cache has none."""
    with results.attempt(PART, "first warm-up", "s"):
        free_bytes = _free_bytes()
        seconds = host_s(engine.warm_up)
        note = f"takes {free_bytes - _free_bytes() >> 20} MiB"
        results.add(PART, Figure("first warm-up", seconds, "s", note=note))
    with results.attempt(PART, "second warm-up", "s"):
        note = f"nothing to compile: captures steps of up to {engine.plan.max_running} sequences, computes prompts"
        results.add(PART, Figure("second warm-up", host_s(engine.warm_up), "s", note=note))


def _step(
    results: Results,
    name: str,
    engine: Engine,
    weights: ModelWeights,
    batch: int,
    sizes: Sizes,
    bar: float | None = None,
) -> None:
    """Steps as a worker takes them, and one by itself, which is over when its tokens are on the host."""
    with results.attempt(PART, name, COPY, bar):
        copy, _ = ceilings(results, sizes)
        entries = _entries(engine, batch, sizes.context)
        alone_s = statistics.median(host_s(lambda: _drawn(engine, entries)) for _ in range(sizes.runs))
        seconds = _step_s(engine, batch, sizes)
        floor_s = _step_bytes(weights, engine.plan.layout, batch * sizes.context) / copy
        note = (
            f"{seconds * 1e3:.4g} ms at {sizes.context} tokens each, {batch / seconds:,.0f} tokens/s; "
            f"by itself {alone_s * 1e3:.4g} ms, {floor_s / alone_s:.0%}"
        )
        results.add(PART, Figure(name, floor_s / seconds, COPY, bar, note, seconds))


def _op_by_op(results: Results, engine: Engine, batch: int, sizes: Sizes, bar: float | None) -> None:
    """How many times as long a step takes whose ops are launched one by one."""
    name = f"replay against op by op, batch {batch}"
    with results.attempt(PART, name, "x", bar):
        results.add(PART, _ratio(name, _step_s(engine, batch, sizes), _seconds(results, _step_name(batch)), bar))


def _prefill(results: Results, name: str, engine: Engine, sizes: Sizes, bar: float | None = None) -> None:
    """A prompt in one piece, as a share of the large product's rate."""
    with results.attempt(PART, name, MATMUL, bar):
        _, matmul = ceilings(results, sizes)
        tokens = sizes.many_rows
        seconds = prefill_s(engine, tokens, sizes)
        rate = prefill_flops(sizes.model, tokens) / seconds
        note = f"{seconds * 1e3:.4g} ms, {tokens / seconds:,.0f} tokens/s, {rate / 1e12:.4g} TFLOP/s"
        results.add(PART, Figure(name, rate / matmul, MATMUL, bar, note, seconds))


def _generate(results: Results, engine: Engine, batch: int, sizes: Sizes) -> None:
    """What transformers is compared with."""
    _, prompt_tokens, new_tokens = sizes.generate
    name = generate_name(batch)
    with results.attempt(PART, name, "tokens/s"):
        generate(engine, batch, prompt_tokens, new_tokens)
        seconds = host_s(lambda: generate(engine, batch, prompt_tokens, new_tokens))
        note = f"{prompt_tokens} tokens each, then {new_tokens} more, in {seconds:.4g} s"
        results.add(PART, Figure(name, batch * new_tokens / seconds, "tokens/s", None, note, seconds))


def _quantized(
    results: Results, form: str, quantization: Quantization, plan: EnginePlan, weights: ModelWeights, sizes: Sizes
) -> None:
    """A step of one sequence, all its linears of few bits."""
    batch, bar = sizes.batches[0], 1.6
    name, step = f"{form} against bfloat16, batch {batch}", f"{_step_name(batch)}, {form}"
    with results.attempt(PART, name, "x", bar):
        few = quantized(weights, quantization)
        with opened(dataclasses.replace(plan, max_running=batch), few) as engine:
            _step(results, step, engine, few, batch, sizes)
        results.add(PART, _ratio(name, _seconds(results, _step_name(batch)), _seconds(results, step), bar))


def quantized(weights: ModelWeights, quantization: Quantization) -> ModelWeights:
    """The same with every linear quantized. weights: for Triton, whose plain ones are the weight itself."""

    def changed(part: object) -> object:
        return LinearWeight(part.packed, part.bias, quantization) if isinstance(part, LinearWeight) else part

    def all_of(record: Any) -> Any:
        return dataclasses.replace(
            record, **{field.name: changed(getattr(record, field.name)) for field in dataclasses.fields(record)}
        )

    layers = tuple(all_of(layer) for layer in weights.layers)
    return dataclasses.replace(all_of(weights), layers=layers)


def prefill_flops(model: Config, tokens: int) -> float:
    """See the module."""
    layers, attended = model["num_hidden_layers"], model["num_attention_heads"] * model["head_dim"]
    linears = 0.0
    for name, (out_features, in_features) in layer_shapes(model).items():
        rows_of_last = tokens if name == "qkv" else 1
        linears += 2 * ((layers - 1) * tokens + rows_of_last) * out_features * in_features
    head = 2 * model["hidden_size"] * model["vocab_size"]
    return linears + layers * 4 * tokens * (tokens + 1) / 2 * attended + head


def _step_s(engine: Engine, batch: int, sizes: Sizes) -> float:
    """A step's share of several, each begun before the tokens of the one before have come."""
    entries = _entries(engine, batch, sizes.context)
    rows, own_tokens, launch = [SampleRow(_GREEDY, 0)] * batch, [-1] * batch, engine.launch
    count = max(sizes.calls, 2)

    def steps() -> None:
        before = None
        for _ in range(count):
            wait = launch(entries, rows, own_tokens) if launch else None
            if wait is None:
                raise RuntimeError("a step that cannot be begun ahead")
            if before is not None:
                before()
            before = wait
        if before is not None:
            before()

    steps()
    return statistics.median(host_s(steps) for _ in range(sizes.runs)) / count


def _drawn(engine: Engine, entries: list[BatchEntry], position: int = 0) -> list[int]:
    """The next tokens. RuntimeError where logits define no distribution."""
    tokens, _ = engine.step(entries, [SampleRow(_GREEDY, position)] * len(entries))
    drawn = [token for token in tokens if token is not None and token >= 0]
    if len(drawn) < len(entries):
        raise RuntimeError(f"{len(drawn)} tokens for {len(entries)} sequences: logits that are no numbers")
    return drawn


def _step_bytes(weights: ModelWeights, layout: KvLayout, kv_tokens: int) -> float:
    """What a step has to read; a few rows of the embedding count for nothing."""
    linears = [part for layer in weights.layers for part in vars(layer).values() if isinstance(part, LinearWeight)]
    head = [weights.lm_head] if weights.lm_head else []
    weight_bytes = sum(weight.num_bytes for weight in (*linears, *head))
    return weight_bytes + kv_tokens * layout.block_bytes / layout.block_tokens


def _entries(engine: Engine, batch: int, context: int) -> list[BatchEntry]:
    """The last token of each sequence, so many with it."""
    tokens, tables = _tokens(engine, batch), _tables(engine, batch, context)
    return [BatchEntry([token], context - 1, table) for token, table in zip(tokens, tables, strict=True)]


def _tokens(engine: Engine, count: int) -> list[int]:
    return random.Random(count).choices(range(engine.plan.architecture.vocab_size), k=count)


def _tables(engine: Engine, sequences: int, tokens: int) -> list[list[int]]:
    """Blocks anywhere in the pool."""
    width = -(-tokens // engine.plan.layout.block_tokens)
    blocks = random.Random(0).sample(range(1, engine.plan.num_blocks), sequences * width)
    return [blocks[row * width : (row + 1) * width] for row in range(sequences)]


def _step_name(batch: int) -> str:
    return f"decode step, batch {batch}"


def generate_name(batch: int) -> str:
    return f"generate, batch {batch}"


def _seconds(results: Results, name: str) -> float:
    """RuntimeError if that was not measured."""
    figure = results.find(PART, name)
    if figure is None or figure.seconds is None:
        raise RuntimeError(f"{name}: not measured")
    return figure.seconds


def _ratio(name: str, slower_s: float, faster_s: float, bar: float | None) -> Figure:
    note = f"{slower_s * 1e3:.4g} ms against {faster_s * 1e3:.4g} ms"
    return Figure(name, slower_s / faster_s, "x", bar, note, slower_s)


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
