"""Each finding, provoked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import library
from shared.doctor.host import Finding, examine

ROOT = Path(__file__).resolve().parent.parent.parent


def find(check: str) -> Finding:
    return next(finding for finding in examine() if finding.check == check)


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "doctor", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_this_host_is_fit_and_the_instructions_are_named() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stderr
    assert f"cpu ops: {library.instruction_set()}" in done.stdout
    assert library.instruction_set() in ("AVX-512 BF16", "AVX-512", "AVX2", "portable C")


def test_without_a_compiler_nothing_can_start(tmp_path: Path) -> None:
    done = run_doctor("--json", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    finding = json.loads(done.stdout)["findings"][0]
    assert (finding["check"], finding["level"]) == ("cpu ops", "error")
    assert "gcc was not found on PATH" in finding["message"]
    assert "install gcc" in finding["remedy"]


@pytest.mark.parametrize(
    ("instructions", "level", "text"),
    [
        ("portable C", "warning", "none of the vector instructions"),
        ("AVX2", "ok", "several times slower for prompts"),
        ("AVX-512", "ok", "several times slower for prompts"),
        ("AVX-512 BF16", "ok", "dot products of bfloat16 pairs"),
    ],
)
def test_each_set_of_instructions(instructions: str, level: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "instruction_set", lambda: instructions)
    finding = find("cpu ops")
    assert finding.level == level
    assert finding.message.startswith(f"{instructions}: ")
    assert text in finding.message
    assert bool(finding.remedy) == (level == "warning")


def on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_one_core() -> None:
    command = [sys.executable, "-c", "from tests.shared.test_doctor import *; on_one_core(); print(find('cores'))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "level='warning'" in done.stdout
    assert "take turns" in done.stdout
    assert "two cores or more" in done.stdout


def test_a_temporary_folder_that_others_can_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert find("shared cores").level == "ok"
    folder = tmp_path / f"tandem-{os.getuid()}"
    assert not folder.exists(), "looking leaves nothing"
    folder.mkdir()
    folder.chmod(0o777)
    finding = find("shared cores")
    assert finding.level == "warning"
    assert "must be a folder that only its owner can write to" in finding.message
    assert "TMPDIR" in finding.remedy
