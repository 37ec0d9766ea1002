"""`make gpu-check`: every test and measurement that needs a CUDA device, and a table of them, in nine minutes.

    python -m benchmarks.gpu [--parts tests,ops,...] [--results FOLDER] [--smoke]

Each part is a process of its own that ends by its time at the latest, and what it has found out by then is in
FOLDER/<device>.json, .md and .log. The exit status is 1 if a test failed or was not run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu.results import Results, table
from benchmarks.gpu.shapes import FULL, SMOKE

# name -> (module, seconds at most)
PARTS = {
    "tests": ("checks", 210),
    "ops": ("ops", 110),
    "engine": ("engine", 90),
    "handoff": ("handoff", 60),
    "service": ("service", 80),
    "interference": ("interference", 110),
    "transformers": ("generate", 90),
}
_TOTAL_S = 500
_ROOT = Path(__file__).resolve().parent.parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(argv)
    if options.file is not None:
        module = importlib.import_module(f"benchmarks.gpu.{PARTS[options.parts[0]][0]}")
        module.run(Results.open(options.file), SMOKE if options.smoke else FULL)
        return 0
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device found: nothing was run; --smoke tries the command itself on a CPU", file=sys.stderr)
        return 1
    deadline_s = time.monotonic() + options.seconds
    folder = options.results or _ROOT / ("build/gpu-smoke" if options.smoke else "benchmarks/results")
    path = Results.create(folder, smoke=options.smoke).path
    with path.with_suffix(".log").open("w") as log:
        for part in options.parts:
            status = _run_part(part, path, log, options.smoke, min(PARTS[part][1], deadline_s - time.monotonic()))
            results = Results.open(path)
            results.part(part)["status"] = status
            results.write()
            print(f"{part}: {status}", flush=True)
    values = Results.open(path).values
    print(f"\n{table(values)}\n{path}, {path.with_suffix('.md')}, {path.with_suffix('.log')}")
    return int("tests" in options.parts and not _passed(values["parts"]["tests"]))


def _run_part(part: str, path: Path, log: TextIO, smoke: bool, seconds: float) -> str:
    """In a process of its own; what became of it."""
    if seconds <= 0:
        return "Not run: no time was left."
    command = [sys.executable, "-m", "benchmarks.gpu", "--parts", part, "--file", str(path), *["--smoke"] * smoke]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    begun_s = time.monotonic()
    # a process that is killed leaves its temporary files
    with tempfile.TemporaryDirectory(prefix="tandem-gpu-", ignore_cleanup_errors=True) as folder:
        environment["TMPDIR"] = folder
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"Stopped after {seconds:.0f} s: its time was over."
        finally:  # with all that it has started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took_s = time.monotonic() - begun_s
    return f"Done in {took_s:.0f} s." if status == 0 else f"Failed after {took_s:.0f} s, status {status}: see the log."


def _passed(tests: dict[str, object]) -> bool:
    figures = tests["figures"]
    assert isinstance(figures, list)
    numbers = {figure["name"]: figure["value"] for figure in figures}
    return bool(numbers.get("passed")) and not numbers.get("failed") and not numbers.get("not run")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="in this order; default: all")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--seconds", type=float, default=_TOTAL_S, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; without a GPU in Triton's interpreter")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # of a part's own process
    return parser


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    raise SystemExit(main())
