"""The host's CPU and memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from kernels.cpu import library
from shared.cores import Cores
from shared.doctor.demand import Demand, mib
from shared.doctor.finding import Finding, error, ok, warning
from shared.doctor.surroundings import Surroundings
from shared.transport.pool_memory import PoolMemory

_STRICT = 2  # of vm.overcommit_memory


def cpu_ops(_: Surroundings) -> Iterator[Finding]:
    """Compiles them, unless they are cached."""
    try:
        instructions = library.instruction_set()
    except RuntimeError as fault:
        yield error("cpu ops", "cpu ops not built", str(fault))
        return
    if instructions == "AVX-512 BF16":
        how = "bfloat16, int8 and int4 weights are multiplied by dot products of bfloat16 pairs"
        yield ok("cpu ops", f"{instructions}: {how}")
    elif instructions == "portable C":
        text = f"{instructions}: this CPU has none of the vector instructions that the ops are written for"
        yield warning("cpu ops", "no vector instructions", text)
    else:
        how = "bfloat16 is multiplied in float32, several times slower for prompts than with AVX-512 BF16"
        yield ok("cpu ops", f"{instructions}: {how}")


def cores(_: Surroundings) -> Iterator[Finding]:
    available, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if available < 2:
        yield warning("cores", "one core", "one core: prefill, decode and the gateway take turns on it")
    elif available < present:
        yield ok("cores", f"{available} of {present} cores may be used here")
    else:
        yield ok("cores", f"{available} cores")


def shared_cores(_: Surroundings) -> Iterator[Finding]:
    try:
        board = Cores.open()
    except OSError as fault:
        text = f"workers cannot tell each other when they compute, and hold each other up: {fault}"
        yield warning("shared cores", "cores not shared", text)
        return
    board.leave()
    yield ok("shared cores", "workers that compute at once each take their part of the cores")


def memory(surroundings: Surroundings) -> Iterator[Finding]:
    sizes = _meminfo(surroundings)
    needed = Demand.of(surroundings.config).total_bytes
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    if needed > total:
        text = f"the workers of `tandem up` take {mib(needed)} at least, and the host has {mib(total)}"
        yield error("host memory", "host too small", text)
    elif needed > available:
        text = f"{mib(available)} of {mib(total)} are free, and the workers of `tandem up` take {mib(needed)} at least"
        yield warning("host memory", "host memory taken", f"{text}; all is well if they are what runs here already")
    else:
        yield ok(
            "host memory", f"{mib(available)} are free, and the workers of `tandem up` take {mib(needed)} at least"
        )


def overcommit(surroundings: Surroundings) -> Iterator[Finding]:
    mode = int((surroundings.proc / "sys/vm/overcommit_memory").read_text())
    sizes = _meminfo(surroundings)
    left = sizes["CommitLimit"] - sizes["Committed_AS"]
    needed = Demand.of(surroundings.config).total_bytes
    if mode == _STRICT and left < needed:
        text = f"vm.overcommit_memory is 2: {mib(left)} may still be promised, and pools and weights take {mib(needed)}"
        yield warning("overcommit", "strict overcommit", f"{text}, so a worker's start may fail with memory free")
    else:
        yield ok("overcommit", f"vm.overcommit_memory is {mode}, which leaves room for pools and weights")


def memory_files(_: Surroundings) -> Iterator[Finding]:
    try:
        PoolMemory(mmap.PAGESIZE).close()
    except OSError as fault:
        text = f"the kernel refuses memory files, in which KV pools lie, so no worker starts: {fault}"
        yield error("memory files", "no memory files", text)
        return
    yield ok("memory files", "memory files can be made and sealed")


def _meminfo(surroundings: Surroundings) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (surroundings.proc / "meminfo").read_text().splitlines()
    fields = [line.replace(":", " ").split() for line in lines]
    return {field[0]: int(field[1]) * (1024 if field[-1] == "kB" else 1) for field in fields}
