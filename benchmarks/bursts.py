"""Steady decode streams while long prompts arrive: what a split of prefill and decode is for."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.driver import Driver, Record
from benchmarks.workload import Shape, random_workload


@dataclass(frozen=True)
class Bursts:
    """So many streams of stream_tokens after prompts of 64; a prompt of prompt_tokens arrives every_s seconds."""

    streams: int = 8
    stream_tokens: int = 300
    prompt_tokens: int = 1500
    every_s: float = 2.0


async def measure_bursts(driver: Driver, seed: int, sizes: Bursts) -> dict[str, Any]:
    """The streams alone, then beside the prompts. Raises RuntimeError if a request failed or no prompt arrived."""
    quiet, quiet_s, _ = await _phase(driver, seed, sizes, bursts=False)
    steady, steady_s, prompts = await _phase(driver, seed + 1, sizes, bursts=True)
    quiet_rate, rate = (sizes.streams * sizes.stream_tokens / seconds for seconds in (quiet_s, steady_s))
    return {
        "p99_itl_ms": _p99_ms(steady),
        "p99_itl_quiet_ms": _p99_ms(quiet),
        "output_throughput": rate,
        "throughput_kept": rate / quiet_rate,
        "median_prompt_ttft_ms": statistics.median(record.ttft_s for record in prompts) * 1000,
        "num_prompts": len(prompts),
    }


async def _phase(driver: Driver, seed: int, sizes: Bursts, *, bursts: bool) -> tuple[list[Record], float, list[Record]]:
    """The steady streams, the seconds they took, and the long prompts."""
    requests = random_workload(Shape(sizes.streams, 64, sizes.stream_tokens, seed=seed))
    prompts: list[asyncio.Task[Record]] = []

    async def burst() -> None:
        for request in random_workload(Shape(1000, sizes.prompt_tokens, 1, seed=seed + 1)):
            await asyncio.sleep(sizes.every_s)
            prompts.append(asyncio.create_task(driver.send(request)))

    arrivals = asyncio.create_task(burst()) if bursts else None
    start = time.perf_counter()
    steady = await asyncio.gather(*(driver.send(request) for request in requests))
    seconds = time.perf_counter() - start
    if arrivals is not None:
        arrivals.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arrivals
    late = await asyncio.gather(*prompts)
    if errors := {record.error for record in [*steady, *late] if record.error}:
        raise RuntimeError(f"bursts: {'; '.join(sorted(errors))}")
    if bursts and not late:
        raise RuntimeError(f"bursts: the streams ended within {sizes.every_s} s, before a prompt arrived")
    return list(steady), seconds, list(late)


def _p99_ms(records: list[Record]) -> float:
    return float(np.percentile([gap for record in records for gap in record.gaps_s], 99)) * 1000
