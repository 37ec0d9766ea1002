"""Steady streams while long prompts arrive on the same device: a prefill and a decode worker, beside the same engine in
one decode worker that computes the prompts in chunks between its steps.

Both services run at once and are measured by turns. Two processes share a device by time slices, or through NVIDIA's
Multi-Process Service, which is started for this alone and ended again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.bursts import measure_bursts
from benchmarks.driver import GrpcDriver
from benchmarks.gpu.results import Figure, Results
from benchmarks.gpu.service import serving, write_model
from benchmarks.gpu.shapes import Sizes
from benchmarks.workload import Shape, random_workload

PART = "interference"
_BAR = 2.0  # the split's 99th percentile is at most half
_ROUNDS = 3
_MPS = "nvidia-cuda-mps-control"
_STARTED_S, _ENDED_S = 10.0, 15.0


def run(results: Results, sizes: Sizes) -> None:
    """Adds both figures."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), sizes.crowded)
        for sharing, shared in (("time slices", nullcontext({})), ("MPS", multi_process_service())):
            name = f"ITL p99 beside prompts, colocated against split, {sharing}"
            with results.attempt(PART, name, "x", _BAR), shared as env:
                split, colocated = asyncio.run(_measure(folder, sizes, env))
                note = f"split: {_describe(split)}; colocated: {_describe(colocated)}"
                ratio = _median(colocated, "p99_itl_ms") / _median(split, "p99_itl_ms")
                results.add(PART, Figure(name, ratio, "x", _BAR, note))


async def _measure(folder: str, sizes: Sizes, env: Mapping[str, str]) -> tuple[list[dict[str, Any]], ...]:
    """What `measure_bursts` found, round by round: split, colocated."""
    bursts = sizes.bursts
    # four prompts at once, and every stream
    tokens = 4 * bursts.prompt_tokens + bursts.streams * (64 + bursts.stream_tokens + sizes.block_tokens)
    num_blocks = 1 + tokens // sizes.block_tokens
    settings = {
        "block_tokens": sizes.block_tokens,
        "prefill.num_blocks": num_blocks,
        "decode.num_blocks": num_blocks,
        "decode.max_running": 2 * bursts.streams,
    }
    async with AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            starting = [
                group.create_task(
                    stack.enter_async_context(serving(folder, prefill=prefill, settings=settings, env=env))
                )
                for prefill in (True, False)
            ]
        drivers = [start.result() for start in starting]
        if env:
            _check_used(env)
        for driver in drivers:
            await _warm_up(driver, sizes)
        found: tuple[list[dict[str, Any]], ...] = ([], [])
        for number in range(min(_ROUNDS, sizes.runs)):
            for driver, of_driver in zip(drivers, found, strict=True):
                of_driver.append(await measure_bursts(driver, 100 * (number + 1), bursts))
    return found


async def _warm_up(driver: GrpcDriver, sizes: Sizes) -> None:
    for shape in (Shape(1, sizes.bursts.prompt_tokens, 4, seed=1), Shape(sizes.bursts.streams, 64, 4, seed=2)):
        records = await asyncio.gather(*(driver.send(request) for request in random_workload(shape)))
        if errors := {record.error for record in records if record.error}:
            raise RuntimeError("; ".join(sorted(errors)))


def _median(found: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(result[figure] for result in found)


def _describe(found: list[dict[str, Any]]) -> str:
    return (
        f"{_median(found, 'p99_itl_ms'):.3g} ms ({_median(found, 'p99_itl_quiet_ms'):.3g} without prompts), "
        f"{_median(found, 'throughput_kept'):.0%} of the tokens a second kept, "
        f"a prompt's first token after {_median(found, 'median_prompt_ttft_ms'):.3g} ms"
    )


@contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """A Multi-Process Service of this process's own: what its clients have in their environment.

    Raises RuntimeError saying why there is none.
    """
    if shutil.which(_MPS) is None:
        raise RuntimeError(f"{_MPS} is not installed")
    os.environ.pop("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", None)
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in env.values():
            Path(path).mkdir()
        # in the foreground: whoever ends this process group ends it too
        daemon = subprocess.Popen([_MPS, "-f"], env={**os.environ, **env}, stdin=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + _STARTED_S
            while not (Path(folder) / "pipe" / "control").exists():
                if daemon.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"{_MPS} does not start: {_last_line(Path(folder) / 'log' / 'control.log')}")
                time.sleep(0.05)
            yield env
        finally:
            try:
                _tell("quit", env)
                daemon.wait(_ENDED_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _check_used(env: Mapping[str, str]) -> None:
    """Its server begins with the first client. RuntimeError if there is none."""
    if not _tell("get_server_list", env):
        raise RuntimeError("the workers run without the Multi-Process Service: it has no server")


def _tell(command: str, env: Mapping[str, str]) -> str:
    """What the daemon answers. Raises subprocess.TimeoutExpired."""
    done = subprocess.run(
        [_MPS], input=f"{command}\n", env={**os.environ, **env}, capture_output=True, text=True, timeout=_ENDED_S,
        check=False,
    )  # fmt: skip
    return done.stdout.strip()


def _last_line(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return lines[-1] if lines else "it says nothing"
