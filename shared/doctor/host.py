"""`tandem doctor`: what of this host decides how fast it serves, and whether it can at all.

for finding in examine():
    print(finding.level, finding.message, finding.remedy)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kernels.cpu import library
from shared.cores import Cores

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """level: an error keeps workers from starting, a warning makes them slower than they could be."""

    check: str
    level: Level
    message: str
    remedy: str = ""  # empty where there is nothing to mend


def examine() -> list[Finding]:
    """Every check, in order."""
    return [finding for check in CHECKS for finding in check()]


def _cpu_ops() -> Iterator[Finding]:
    try:
        instructions = library.instruction_set()
    except RuntimeError as error:
        yield Finding("cpu ops", "error", str(error), "install gcc, and let XDG_CACHE_HOME name a folder to write to")
        return
    if instructions == "AVX-512 BF16":
        how = "bfloat16, int8 and int4 weights are multiplied by dot products of bfloat16 pairs"
        yield Finding("cpu ops", "ok", f"{instructions}: {how}")
    elif instructions == "portable C":
        text = f"{instructions}: this CPU has none of the vector instructions that the ops are written for"
        yield Finding("cpu ops", "warning", text, "use an x86 CPU with AVX2, or better with AVX-512 BF16")
    else:
        how = "bfloat16 is multiplied in float32, several times slower for prompts than with AVX-512 BF16"
        yield Finding("cpu ops", "ok", f"{instructions}: {how}")


def _cores() -> Iterator[Finding]:
    available, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if available < 2:
        text = "one core: prefill, decode and the gateway take turns on it"
        yield Finding("cores", "warning", text, "give the processes two cores or more")
    elif available < present:
        text = f"{available} of {present} cores may be used here"
        yield Finding("cores", "ok", text)
    else:
        yield Finding("cores", "ok", f"{available} cores")


def _shared_cores() -> Iterator[Finding]:
    try:
        cores = Cores.open()
    except OSError as error:
        text = f"workers cannot tell each other when they compute, and hold each other up: {error}"
        yield Finding("shared cores", "warning", text, "let TMPDIR name a folder that the workers of this host share")
        return
    cores.leave()
    yield Finding("shared cores", "ok", "workers that compute at once each take their part of the cores")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_cpu_ops, _cores, _shared_cores)
