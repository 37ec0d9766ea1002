"""The handoff of a prompt's keys and values between two processes on one device, by each way to export a pool.

The prefill side is a process of its own (prefill_side.py), the decode side is this one, over gRPC on loopback. A
handoff takes from the call of Importer.copy with the first extent to its return with the last; its floor is what a copy
of as many bytes takes between two tensors of this process, bytes read and bytes written counted alike. A prompt's
handoff is to take at most a hundredth of its prefill: the bar is so many handoffs to a prefill.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tandem.v1 import kv_pb2, types_pb2
from torch import Tensor

from benchmarks.gpu.engine import make_plan, make_weights, opened, prefill_s
from benchmarks.gpu.prefill_side import EXPORT_ID, contents, make_driver
from benchmarks.gpu.results import COPY, Figure, Results
from benchmarks.gpu.shapes import Sizes, device
from benchmarks.gpu.timing import call_s
from kernels.transfer import transfer_tokens
from shared.config import TransportConfig
from shared.kv_cache import KvLayout
from shared.policies.table import architecture_of
from shared.transport.cuda import CudaDriver
from shared.transport.device_mapping import DeviceMapping
from shared.transport.device_pool import DevicePool, Export
from shared.transport.importer import Importer
from shared.transport.target import DeviceTarget

PART = "handoff"
_EXPORTS: tuple[Export, ...] = ("descriptor", "handle")
_SHARE, _HANDOFFS = 0.6, 100.0  # bars: of the copy's bandwidth, and to a prefill
_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class PrefillSide:
    """prefill_side.py, serving. blocks: of its pool, with a prompt's tokens in order."""

    layout: KvLayout
    blocks: Sequence[int]
    kv_endpoint: str
    epoch: int
    mark: int

    def extents(self, tokens: int, count: int) -> list[kv_pb2.KvExtent]:
        """A prompt of so many tokens, in so many parts."""
        step = tokens // count
        return [
            kv_pb2.KvExtent(
                kv_endpoint=self.kv_endpoint,
                epoch=self.epoch,
                layout_digest=self.layout.digest,
                block_ids=self.blocks[
                    first // self.layout.block_tokens : -(-(first + step) // self.layout.block_tokens)
                ],
                first_token=first,
                num_tokens=step,
                export_id=EXPORT_ID,
                mark=self.mark,
            )
            for first in range(0, tokens, step)
        ]


@dataclass(frozen=True)
class DecodeSide:
    """An importer in this process, and where it puts the prompt."""

    layout: KvLayout
    blocks: Sequence[int]
    pool: DevicePool
    importer: Importer


def run(results: Results, sizes: Sizes) -> None:
    """Adds every figure."""
    tokens, _ = sizes.handoff
    prefill = f"prefill, {tokens} tokens"
    with results.attempt(PART, prefill, "ms"):
        with opened(make_plan(sizes), make_weights(sizes.model)) as engine:
            seconds = prefill_s(engine, tokens, sizes)
        results.add(PART, Figure(prefill, seconds * 1e3, "ms", seconds=seconds))
    layout = _layout(sizes)
    num_bytes = tokens // layout.block_tokens * layout.block_bytes
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device()) for _ in range(2))
    seconds = call_s([partial(target.copy_, source)], runs=sizes.runs, at_least=sizes.calls)
    rate, note = 2 * num_bytes / seconds, f"{num_bytes >> 20} MiB read, as many written, in {seconds * 1e3:.4g} ms"
    results.add(PART, Figure("copy", rate / 1e9, "GB/s", note=note, seconds=seconds))
    del source, target
    driver = make_driver()
    for export in _EXPORTS:
        hands = f"handshake, {export}"
        with results.attempt(PART, hands, "ms"):
            asyncio.run(_measure(results, sizes, driver, export, hands, rate))


async def _measure(results: Results, sizes: Sizes, driver: CudaDriver, export: Export, hands: str, rate: float) -> None:
    """With one prefill side. rate: bytes a second of a copy."""
    layout, (tokens, parts) = _layout(sizes), sizes.handoff
    async with _prefill_side(layout, tokens, export) as prefill:
        async with _decode_side(driver, layout, tokens) as decode:
            begun_s = time.perf_counter()
            pair = await decode.importer.connect(prefill.kv_endpoint)
            note = "hands shaken, the pool mapped, a block moved out of it"
            results.add(PART, Figure(hands, (time.perf_counter() - begun_s) * 1e3, "ms", note=note))
            for count, what in ((1, "one extent"), (parts, f"{parts} extents")):
                await _copies(
                    results, f"{tokens} tokens, {what}, {export}", prefill, decode, count, sizes, rate, _SHARE
                )
            mapping = pair.mappings[0]
            assert isinstance(mapping, DeviceMapping)
            _launch(results, f"its launch alone, {export}", prefill, decode, mapping.tensor, sizes, rate)
        _handoffs(results, export, tokens)
        if export != _EXPORTS[0]:
            return
        for what, target in (
            (f"to blocks of {4 * layout.block_tokens} tokens", replace(layout, block_tokens=4 * layout.block_tokens)),
            ("to int8", replace(layout, dtype="int8")),
        ):
            async with _decode_side(driver, target, tokens) as decode:
                await _copies(results, f"{tokens} tokens {what}", prefill, decode, 1, sizes, rate, None)


async def _copies(
    results: Results,
    name: str,
    prefill: PrefillSide,
    decode: DecodeSide,
    count: int,
    sizes: Sizes,
    rate: float,
    bar: float | None,
) -> None:
    """The prompt handed over again and again, its extents one after another as a decode worker copies them."""
    tokens, _ = sizes.handoff
    extents = prefill.extents(tokens, count)

    async def handoff() -> float:
        begun_s = time.perf_counter()
        for extent in extents:
            result = await decode.importer.copy(extent, decode.blocks)
            if result.transport != types_pb2.TRANSPORT_CUDA_IPC:
                raise RuntimeError(f"copied over {types_pb2.Transport.Name(result.transport)}")
        return time.perf_counter() - begun_s

    with results.attempt(PART, name, COPY, bar):
        await handoff()  # compiles
        seconds = statistics.median([await handoff() for _ in range(sizes.runs)])
        if prefill.layout.dtype == decode.layout.dtype and not _same(prefill, decode, tokens):
            raise RuntimeError("the bytes that arrived are not those that were sent")
        num_bytes = _bytes(prefill, tokens) + _bytes(decode, tokens)
        note = f"{seconds * 1e3:.4g} ms, {num_bytes / seconds / 1e9:,.0f} GB/s read and written"
        results.add(PART, Figure(name, num_bytes / rate / seconds, COPY, bar, note, seconds))


def _launch(
    results: Results,
    name: str,
    prefill: PrefillSide,
    decode: DecodeSide,
    mapped: Tensor,
    sizes: Sizes,
    rate: float,
) -> None:
    """What of a handoff is the device's."""
    tokens, _ = sizes.handoff
    with results.attempt(PART, name, COPY):
        tables = [torch.tensor(side.blocks, dtype=torch.int32, device=device()) for side in (prefill, decode)]
        source, target = prefill.layout, decode.layout
        call = partial(
            transfer_tokens,
            mapped.view(-1, source.block_bytes), source.format, tables[0], 0,
            decode.pool.tensor.view(-1, target.block_bytes), target.format, tables[1], 0, tokens,
        )  # fmt: skip
        seconds = call_s([call], runs=sizes.runs, at_least=sizes.calls)
        num_bytes = _bytes(prefill, tokens) + _bytes(decode, tokens)
        results.add(
            PART, Figure(name, num_bytes / rate / seconds, COPY, note=f"{seconds * 1e3:.4g} ms", seconds=seconds)
        )


def _handoffs(results: Results, export: Export, tokens: int) -> None:
    """Of a prompt in one extent, as many as take as long as its prefill."""
    name = f"handoffs to a prefill, {export}"
    with results.attempt(PART, name, "x", _HANDOFFS):
        prefill = results.find(PART, f"prefill, {tokens} tokens")
        handoff = results.find(PART, f"{tokens} tokens, one extent, {export}")
        if prefill is None or prefill.seconds is None or handoff is None or handoff.seconds is None:
            raise RuntimeError("the prefill or the handoff was not measured")
        note = f"a handoff takes {handoff.seconds / prefill.seconds:.2%} of {prefill.seconds * 1e3:.4g} ms"
        results.add(PART, Figure(name, prefill.seconds / handoff.seconds, "x", _HANDOFFS, note))


@asynccontextmanager
async def _prefill_side(layout: KvLayout, tokens: int, export: Export) -> AsyncIterator[PrefillSide]:
    num_blocks, blocks = _blocks(layout, tokens, seed=0)
    options = {"layout": asdict(layout), "num_blocks": num_blocks, "export": export}
    process = subprocess.Popen(  # noqa: ASYNC220 - forks and execs at once
        [sys.executable, "-m", "benchmarks.gpu.prefill_side", json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    with process:  # closes its pipes, so that it ends, and waits
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        if not line:
            raise RuntimeError("the prefill side ended before it served: see the log")
        yield PrefillSide(layout, blocks, **json.loads(line))


@asynccontextmanager
async def _decode_side(driver: CudaDriver, layout: KvLayout, tokens: int) -> AsyncIterator[DecodeSide]:
    num_blocks, blocks = _blocks(layout, tokens, seed=1)
    async with AsyncExitStack() as stack:
        pool = DevicePool(driver, num_blocks * layout.block_bytes)
        stack.callback(pool.close)
        pool.settle(pool.mark())  # its zeros
        target = DeviceTarget(layout, pool)
        stack.callback(target.close)
        config = TransportConfig(require="cuda_ipc", convert_dtype=True)
        importer = Importer([target], worker_id="decode", config=config)
        stack.push_async_callback(importer.close)
        yield DecodeSide(layout, blocks, pool, importer)


def _layout(sizes: Sizes) -> KvLayout:
    return KvLayout.of(architecture_of(sizes.model), "0" * 64, "bfloat16", sizes.block_tokens)


def _blocks(layout: KvLayout, tokens: int, *, seed: int) -> tuple[int, list[int]]:
    """How many a pool has, and a prompt's own, anywhere in it."""
    count = -(-tokens // layout.block_tokens)
    return 1 + 2 * count, random.Random(seed).sample(range(1, 1 + 2 * count), count)


def _bytes(side: PrefillSide | DecodeSide, tokens: int) -> int:
    """Of the prompt's tokens there."""
    return tokens * side.layout.block_bytes // side.layout.block_tokens


def _same(prefill: PrefillSide, decode: DecodeSide, tokens: int) -> bool:
    """Whether each row is, bit by bit, what the prefill side's random bytes are there."""
    num_blocks, _ = _blocks(prefill.layout, tokens, seed=0)
    sent = contents(num_blocks * prefill.layout.block_bytes)
    return all(
        torch.equal(theirs, ours)
        for theirs, ours in zip(
            _rows(prefill.layout, sent, prefill.blocks, tokens),
            _rows(decode.layout, decode.pool.tensor, decode.blocks, tokens),
            strict=True,
        )
    )


def _rows(layout: KvLayout, pool: Tensor, blocks: Sequence[int], tokens: int) -> list[Tensor]:
    """For each layer, int16 [tokens, 2, kv_heads, head_dim]."""
    elements = layout.format.elements(pool.view(-1, layout.block_bytes)).view(torch.int16)
    table = torch.tensor(blocks, device=pool.device)
    return [elements[table, layer].movedim(3, 1).flatten(0, 1)[:tokens] for layer in range(layout.num_layers)]
