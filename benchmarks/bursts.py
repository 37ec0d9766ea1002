"""Steady decode streams while long prompts arrive: what a split of prefill and decode is for.

8 streams of 300 tokens after 64-token prompts, first alone, then while a 1,500-token prompt arrives every 2 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.driver import Driver, Record
from benchmarks.workload import Shape, random_workload

STREAMS, STREAM_TOKENS = 8, 300
PROMPT_TOKENS, EVERY_S = 1500, 2.0


async def measure_bursts(driver: Driver, seed: int) -> dict[str, Any]:
    """Both phases, once. Raises RuntimeError if a request failed."""
    quiet, quiet_s, _ = await _phase(driver, seed, bursts=False)
    steady, steady_s, prompts = await _phase(driver, seed + 1, bursts=True)
    quiet_rate, rate = (STREAMS * STREAM_TOKENS / seconds for seconds in (quiet_s, steady_s))
    return {
        "p99_itl_ms": _p99_ms(steady),
        "p99_itl_quiet_ms": _p99_ms(quiet),
        "output_throughput": rate,
        "throughput_kept": rate / quiet_rate,
        "median_prompt_ttft_ms": statistics.median(record.ttft_s for record in prompts) * 1000,
        "num_prompts": len(prompts),
    }


async def _phase(driver: Driver, seed: int, *, bursts: bool) -> tuple[list[Record], float, list[Record]]:
    """The steady streams, the seconds they took, and the long prompts."""
    requests = random_workload(Shape(STREAMS, 64, STREAM_TOKENS, seed=seed))
    prompts: list[asyncio.Task[Record]] = []

    async def burst() -> None:
        for request in random_workload(Shape(1000, PROMPT_TOKENS, 1, seed=seed + 1)):
            await asyncio.sleep(EVERY_S)
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
    return list(steady), seconds, list(late)


def _p99_ms(records: list[Record]) -> float:
    return float(np.percentile([gap for record in records for gap in record.gaps_s], 99)) * 1000
