"""The command line of every role process: where its configuration comes from, and whom it dies with.

    python -m prefill_worker --config tandem.yaml --set prefill.port=0 --set prefill.num_blocks=64 --die-with-parent

Imports nothing heavy: a process sets its environment between reading its arguments and importing torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import ConfigError, TandemConfig, load_config

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    config: TandemConfig
    die_with_parent: bool


def parse_arguments(role: str, argv: Sequence[str] | None = None) -> Arguments:
    """Reads a role process's command line; exits with status 2 and the field's name if the configuration is refused."""
    parser = argparse.ArgumentParser(prog=f"python -m {role}", description=f"Tandem's {role.replace('_', ' ')}.")
    parser.add_argument("--config", type=Path, metavar="PATH", help="YAML file; default: tandem.yaml, if there is one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="wins over the file and the environment"
    )
    section = role.removesuffix("_worker")
    if section != role:
        parser.add_argument("--tp", type=int, metavar="N", help=f"ranks of this worker; as --set {section}.tp=N")
    parser.add_argument("--die-with-parent", action="store_true", help="get SIGTERM when the parent process ends")
    options = parser.parse_args(argv)
    ranks = [f"{section}.tp={options.tp}"] if getattr(options, "tp", None) is not None else []
    try:
        config = load_config(options.config, parse_overrides([*options.set, *ranks]))
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return Arguments(config, options.die_with_parent)


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """["decode.max_running=8"] -> {"decode": {"max_running": 8}}. Values are JSON if they parse as such, else text.

    Raises ConfigError naming an assignment without key or `=`, or a key that is both a section and a value.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {assignment}: must look like key.path=value")
        section = overrides
        for part in parts[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {assignment}: {part} was set to a value before")
        section[parts[-1]] = _parse_value(text)
    return overrides


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel for a signal when the parent ends, and ends now if it ended meanwhile.

    A parent with process id 1 is no sign of an orphan: in a container `tandem up` has it. A process whose parent ended
    before this call finds nobody at the other end of the pipe that takes its ready line, and ends there.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(0)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def set_threads(num_threads: int | None) -> None:
    """Sets up OpenMP for a process that is about to load it. num_threads: None = all cores.

    Threads that spin while another process wants the core make everything 5 to 20 times slower, so they wait passively.
    """
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(num_threads or len(os.sched_getaffinity(0)))
