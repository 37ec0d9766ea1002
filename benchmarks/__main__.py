"""`make bench`: starts a Tandem of one prefill and one decode worker and measures four workloads over gRPC.

    python -m benchmarks [--repetitions 3] [--dtype bfloat16] [--quantization int8] [--model NAME]
                         [--target HOST:PORT] [--json PATH]

Random prompts, greedy, no early end. Each figure is the median over the repetitions; `foreign` is the share of the CPU
that other programs used meanwhile (a server that was not started here counts as one): above 8% a run tells little.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.driver import Driver, GrpcDriver, HttpDriver
from benchmarks.report import summarise, write_json
from benchmarks.serve import run
from benchmarks.workload import Shape, random_workload
from cli.supervisor import Supervisor
from shared.config import DEFAULT_MODEL, QuantizationMode


@dataclass(frozen=True)
class Cell:
    """One workload: so many requests at once, of so many tokens."""

    name: str
    concurrency: int
    input_tokens: int
    output_tokens: int
    num_requests: int


CELLS = (
    Cell("one stream, 128 → 128", 1, 128, 128, 3),
    Cell("8 at once, 512 → 64", 8, 512, 64, 8),
    Cell("32 at once, 64 → 64", 32, 64, 64, 32),
    Cell("one stream, 1500 → 1", 1, 1500, 1, 2),
)
WARM_UP = Cell("warm-up", 2, 128, 16, 4)
FIGURES = {"median_ttft_ms": "TTFT ms", "median_tpot_ms": "TPOT ms", "output_throughput": "output tok/s"}


class _Foreign:
    """The share of the CPU that goes to other programs than this one and its children, in percent."""

    def __init__(self) -> None:
        own = psutil.Process()
        self._processes = [own, *own.children(recursive=True)]
        self._start = self._read()

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        busy = total - times.idle - getattr(times, "iowait", 0)
        own = {process.pid: sum(process.cpu_times()[:2]) for process in self._processes if process.is_running()}
        return busy, total, sum(own.values())

    def percent(self) -> float:
        busy, total, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, 100 * (busy - own) / max(total, 1e-9))


async def measure(driver: Driver, cell: Cell, seed: int) -> dict[str, Any]:
    """One repetition of a cell. Raises RuntimeError if a request failed."""
    shape = Shape(cell.num_requests, cell.input_tokens, cell.output_tokens, seed=seed)
    foreign = _Foreign()
    records, duration_s = await run(driver, random_workload(shape), concurrency=cell.concurrency)
    errors = {record.error for record in records if record.error}
    if errors:
        raise RuntimeError(f"{cell.name}: {'; '.join(sorted(errors))}")
    return {**summarise(records, duration_s), "foreign_cpu_percent": foreign.percent()}


async def measure_all(driver: Driver, repetitions: int) -> dict[str, dict[str, Any]]:
    """Every cell, the repetitions interleaved so that a noisy minute does not hit one cell alone."""
    await measure(driver, WARM_UP, seed=999)
    runs: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in CELLS}
    for repetition in range(repetitions):
        for number, cell in enumerate(CELLS):
            runs[cell.name].append(await measure(driver, cell, seed=1000 + 17 * repetition + number))
    return {
        name: {
            **{figure: statistics.median(result[figure] for result in results) for figure in FIGURES},
            "foreign_cpu_percent": max(result["foreign_cpu_percent"] for result in results),
            "repetitions": results,
        }
        for name, results in runs.items()
    }


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, title_justify="left")
    table.add_column("workload")
    for name in (*FIGURES.values(), "foreign CPU"):
        table.add_column(name, justify="right")
    for name, figures in results.items():
        cells = [f"{figures[figure]:.1f}" for figure in FIGURES]
        table.add_row(name, *cells, f"{figures['foreign_cpu_percent']:.0f}%")
    Console(width=100).print(table)


async def _main(options: argparse.Namespace) -> None:
    if options.url:
        async with HttpDriver(options.url, options.served) as driver:
            results = await measure_all(driver, options.repetitions)
    elif options.target:
        async with GrpcDriver(options.target) as driver:
            results = await measure_all(driver, options.repetitions)
    else:
        settings = {"model": options.model, "dtype": options.dtype, "quantization": options.quantization}
        async with Supervisor(settings=settings) as supervisor:
            await asyncio.gather(
                supervisor.start("prefill_worker", {"prefill.port": 0}),
                supervisor.start("decode_worker", {"decode.port": 0}),
            )
            gateway = await supervisor.start("gateway", {"gateway.port": 0, "gateway.http_port": 0})
            async with GrpcDriver(gateway.grpc) as driver:
                results = await measure_all(driver, options.repetitions)
    kind = options.dtype if options.quantization == "none" else f"{options.dtype} with {options.quantization} weights"
    show(results, options.url or options.target or f"{options.model}, {kind}, 1 prefill + 1 decode worker")
    if options.json:
        write_json(results, options.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quantization", default="none", choices=get_args(QuantizationMode))
    parser.add_argument("--target", help="host:port of a gateway that runs already")
    parser.add_argument("--url", help="base address of any OpenAI server that runs already")
    parser.add_argument("--served", default="", help="with --url: the model's name there")
    parser.add_argument("--json", type=Path, help="write the figures")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
