"""Every test marked `gpu`, by several processes: compiling takes longest. After a fault of the device a process fails
whatever it runs; such tests are run again, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.results import Figure, Results
from benchmarks.gpu.shapes import Sizes

PART = "tests"
ROOT = Path(__file__).resolve().parent.parent.parent
_PROCESSES, _GIB_EACH = 10, 8
_CHUNKS_EACH = 4  # one after another: no process is at work long after the others
_WHOLES, _AGAIN = 3, 64  # tests of whole engines in a chunk; tests that are run again at most
_TEST_S = 150  # with what has to be compiled; a thread sees to it, since whoever waits for a device hears no signal
_OUTCOME = re.compile(r"^(tests/\S+?\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_MESSAGE = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py::.*?) - (.*)$", re.MULTILINE)


@dataclass
class Chunk:
    """Tests, and what became of them."""

    tests: Sequence[str]
    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)  # what an earlier test may have spoilt


def run(results: Results, sizes: Sizes) -> None:
    """Adds how many passed, failed, were skipped and are not run, and the messages of those that failed."""
    on_device = torch.cuda.is_available()
    tests = collect(sizes.tests, "gpu" if on_device else "not gpu and not slow")
    processes = min(len(os.sched_getaffinity(0)), _PROCESSES)
    if on_device:
        processes = max(min(processes, torch.cuda.get_device_properties().total_memory // (_GIB_EACH << 30)), 1)
    ops = [test for test in tests if test.startswith("tests/kernels")]
    wholes = [test for test in tests if test not in set(ops)]  # engines and services, which take longest: they begin
    done = Chunk(tests)
    size = -(-len(ops) // (processes * _CHUNKS_EACH)) or 1
    _run_chunks(results, done, [*_cut(wholes, _WHOLES), *_cut(ops, size)], processes)
    _run_chunks(results, done, _cut(done.again[:_AGAIN], 1), processes)


def _run_chunks(results: Results, done: Chunk, chunks: list[list[str]], processes: int) -> None:
    """Adds their outcomes to what is done."""
    with ThreadPoolExecutor(processes) as pool:
        for running in as_completed([pool.submit(run_chunk, chunk) for chunk in chunks]):
            chunk = running.result()
            for test in chunk.outcomes:  # a message of an earlier run is none of this one
                done.messages.pop(test, None)
            done.outcomes |= chunk.outcomes
            done.messages |= chunk.messages
            done.again += chunk.again
            _write(results, done)


def collect(path: str, marker: str) -> list[str]:
    """The ids of the tests, in their order."""
    done = _pytest("--collect-only", "-q", "-m", marker, path)
    print(done, flush=True)
    return [line for line in done.splitlines() if line.startswith("tests/") and "::" in line]


def run_chunk(tests: Sequence[str]) -> Chunk:
    """Runs them in order, in a process of their own."""
    output = _pytest("-v", "-rfE", "--tb=short", f"--timeout={_TEST_S}", "--timeout-method=thread", *tests)
    print(output, flush=True)
    return read_chunk(tests, output)


def read_chunk(tests: Sequence[str], output: str) -> Chunk:
    """What pytest's output says of them. One that failed or was not reached after a fault of the device, or after the
    process's own end, is to be run again."""
    chunk = Chunk(tests, dict(_OUTCOME.findall(output)), dict(_MESSAGE.findall(output)))
    lost = [test for test in tests if test not in chunk.outcomes]
    bad = [test for test in tests if chunk.outcomes.get(test) in ("FAILED", "ERROR")]
    if lost:
        chunk.outcomes[lost[0]] = "FAILED"
        chunk.messages[lost[0]] = "the process ended: " + " ".join(output.strip().splitlines()[-1:])
        chunk.again += lost[1:]
    if "CUDA error" in output:
        chunk.again += bad[1:]
    return chunk


def _cut(tests: list[str], size: int) -> list[list[str]]:
    return [tests[first : first + size] for first in range(0, len(tests), size)]


def _write(results: Results, done: Chunk) -> None:
    """Adds the numbers so far."""
    for name, kinds in (("passed", ("PASSED",)), ("failed", ("FAILED", "ERROR")), ("skipped", ("SKIPPED",))):
        number = sum(outcome in kinds for outcome in done.outcomes.values())
        results.add(PART, Figure(name, number, "tests"))
    results.part(PART)["failures"] = [
        f"{test}: {done.messages.get(test, '')[:300]}"
        for test, outcome in sorted(done.outcomes.items())
        if outcome in ("FAILED", "ERROR")
    ]
    results.add(PART, Figure("not run", sum(test not in done.outcomes for test in done.tests), "tests"))


def _pytest(*arguments: str) -> str:
    """What it prints. A host's own plugins are not ours, nor are its packages' warnings our errors."""
    plugins = ("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *plugins, "-W", "default", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "300"}
    environment.pop("TRITON_INTERPRET", None)  # tests see to that themselves
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout
