"""`make bench-peers`: Tandem and other OpenAI servers by turns on this machine, with one client, and their ratios.

    python -m benchmarks.peers [--repetitions 3] [--quantization int8] [--json PATH]
        --peer "llama.cpp=llama-server -m model.gguf --alias smollm2 --port {port} -t 2 -np 32 -c 65536"
        --peer "vllm=vllm serve folder --served-model-name smollm2 --port {port}" --served smollm2

Each repetition starts, measures and stops one server after the other. A peer's command gets `{port}`, and its model
must answer to the name --served. `start` is the time from the command to the first token of a short request; `memory`
is the proportional set size of all its processes after the workloads, in which what they share is counted once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, get_args

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import CELLS, WARM_UP, measure
from benchmarks.bursts import Bursts, measure_bursts
from benchmarks.driver import HttpDriver
from benchmarks.report import write_json
from benchmarks.workload import Request
from shared.config import DEFAULT_MODEL, QuantizationMode

READY_S = 600.0
_FOREIGN = "other programs' % of the CPU"  # a repetition counts only if it is small
ROOT = Path(__file__).resolve().parent.parent


@contextlib.asynccontextmanager
async def running(command: Sequence[str], port: int) -> AsyncIterator[psutil.Process]:
    """A server in a process group of its own, ready when it lists its models; nothing of it is left afterwards."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, process_group=0
    )
    try:
        await _ready(process, f"http://127.0.0.1:{port}/v1/models")
        yield psutil.Process(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, url: str) -> None:
    end = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end:
            if process.returncode is not None:
                raise RuntimeError(f"the server ended with status {process.returncode} before it was ready")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"{url} did not answer within {READY_S:g} s")


async def measure_server(command: str, served: str, seed: int, *, bursts: bool) -> dict[str, Any]:
    """Starts a server, runs every workload once, stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    async with running(shlex.split(command.replace("{port}", str(port))), port) as process:
        async with HttpDriver(f"http://127.0.0.1:{port}", served) as driver:
            first = await driver.send(Request(0.0, tuple(range(100, 108)), None, 1))
            if first.error:
                raise RuntimeError(first.error)
            figures: dict[str, Any] = {"start s": time.perf_counter() - start, _FOREIGN: 0.0}
            await measure(driver, WARM_UP, seed=999)
            for number, cell in enumerate(CELLS):
                result = await measure(driver, cell, seed=seed + number)
                figures[_FOREIGN] = max(figures[_FOREIGN], result["foreign_cpu_percent"])
                figures[f"{cell.name}: TTFT ms"] = result["median_ttft_ms"]
                if cell.output_tokens > 1:
                    figures[f"{cell.name}: TPOT ms"] = result["median_tpot_ms"]
                    figures[f"{cell.name}: tok/s"] = result["output_throughput"]
            if bursts:
                result = await measure_bursts(driver, seed, Bursts())
                figures["bursts: ITL p99 ms"] = result["p99_itl_ms"]
                figures["bursts: tok/s"] = result["output_throughput"]
                figures["bursts: part of the quiet tok/s"] = result["throughput_kept"]
                figures["bursts: prompts' TTFT ms"] = result["median_prompt_ttft_ms"]
        group = [process, *process.children(recursive=True)]
        figures["memory MiB"] = sum(one.memory_full_info().pss for one in group) / 2**20
    return figures


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and each peer's figure over Tandem's."""
    ours, *peers = results
    medians = {name: _medians(runs) for name, runs in results.items()}
    table = Table(title="medians; in brackets Tandem's figure over the peer's", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for figure, value in medians[ours].items():
        if figure == _FOREIGN:
            continue
        cells = [f"{medians[peer][figure]:.4g} ({value / medians[peer][figure]:.2f})" for peer in peers]
        table.add_row(figure, f"{value:.4g}", *cells)
    Console(width=50 + 26 * len(results)).print(table)


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


async def _main(options: argparse.Namespace) -> None:
    model = f"--model {options.model} --dtype {options.dtype} --quantization {options.quantization}"
    tandem = f"{ROOT}/tandem up --port 0 --set gateway.http_port={{port}} {model}"
    servers = {"Tandem": (tandem, "")}
    for peer in options.peer:
        name, equals, command = peer.partition("=")
        if not equals or "{port}" not in command:
            raise SystemExit(f"--peer {peer!r}: must look like name=command with {{port}} in it")
        servers[name] = command, options.served
    if task := asyncio.current_task():  # ended from outside, it still ends the server that runs
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for repetition in range(options.repetitions):
        for name, (command, served) in servers.items():
            print(f"repetition {repetition + 1} of {options.repetitions}: {name}", file=sys.stderr, flush=True)
            figures = await measure_server(command, served, 1000 + 17 * repetition, bursts=options.bursts)
            for figure, value in figures.items():
                print(f"  {figure}: {value:.4g}", file=sys.stderr, flush=True)
            results[name].append(figures)
    show(results)
    if options.json:
        write_json(results, options.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--served", default="", help="the model's name at the peers")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quantization", default="none", choices=get_args(QuantizationMode))
    parser.add_argument("--no-bursts", dest="bursts", action="store_false", help="leave out the long prompts")
    parser.add_argument("--json", type=Path, help="write the figures of every repetition")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
