"""Places for the doctor to look at: hosts and containers made of files, and real ones of the kernel's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.arguments import parse_overrides
from shared.config import TandemConfig, load_config
from shared.doctor.finding import Finding
from shared.doctor.surroundings import Surroundings
from tests.shared.doctor.fake_nvml import FakeNvml

ROOT = Path(__file__).resolve().parent.parent.parent.parent
IMPORT_PATH = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
HOST_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
PLENTY = "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\nCommitLimit: 64000000 kB\nCommitted_AS: 1000 kB\nPages: 0\n"


def config_of(*assignments: str) -> TandemConfig:
    """The default configuration with these keys of --set."""
    return load_config(overrides=parse_overrides(assignments))


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Writes files below a folder; a value that begins with -> is a link."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            path.symlink_to(text.removeprefix("->"))
        else:
            path.write_text(text)
    return root


def host(
    folder: Path,
    *assignments: str,
    files: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    nvml: Any = None,
    import_path: Sequence[str] | None = None,
) -> Surroundings:
    """A host with nothing amiss, made of files in `folder`; `files` are written over its own."""
    links = {f"proc/self/ns/{kind}": f"->{kind}:[{number}]" for kind, number in HOST_NAMESPACES.items()}
    plain = {"proc/meminfo": PLENTY, "proc/sys/vm/overcommit_memory": "0\n", "proc/self/cgroup": "0::/\n"}
    write(folder, {**links, **plain, "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n", **(files or {})})
    (folder / "dev").mkdir(exist_ok=True)
    return Surroundings(
        config_of(*assignments),
        environment=environment or {},
        root=folder,
        proc=folder / "proc",
        sys=folder / "sys",
        dev=folder / "dev",
        nvml=nvml or FakeNvml(),
        **({"import_path": import_path} if import_path is not None else {}),
    )


def the(findings: Iterable[Finding], kind: str) -> Finding:
    """The one finding of a kind."""
    found = list(findings)
    matches = [finding for finding in found if finding.kind == kind]
    assert len(matches) == 1, f"{len(matches)} findings of kind {kind!r} among {found}"
    return matches[0]


def level_of(findings: Iterable[Finding], check: str) -> str:
    """The level of a check's only finding."""
    [finding] = [finding for finding in findings if finding.check == check]
    return finding.level


def examine_under(
    *command: str,
    script: str = "",
    assignments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """What a doctor finds that `command` starts. script: Python that it runs first."""
    source = "\n".join(
        [
            "import dataclasses, json",
            "from tests.shared.doctor.places import config_of",
            "from shared.doctor.examination import examine",
            "from shared.doctor.surroundings import Surroundings",
            f"surroundings = Surroundings(config_of(*{list(assignments)!r}))",
            script,
            "groups = examine(surroundings)",
            "print(json.dumps([dataclasses.asdict(finding) for group in groups.values() for finding in group]))",
        ]
    )
    done = subprocess.run(
        [*command, sys.executable, "-c", source],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_PATH, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**fields) for fields in json.loads(done.stdout)]


def need(*command: str) -> None:
    """Skips the test where the kernel does not let this user run `command`."""
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)} is not allowed here: {done.stderr.strip()}")
