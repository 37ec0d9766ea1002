"""`make bench-peers` with a second Tandem as the peer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_measures_both_and_leaves_nothing(default_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    peer = f"again={ROOT}/tandem up --port 0 --set gateway.http_port={{port}}"
    done = run("--repetitions", "1", "--json", str(path), "--peer", peer)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert list(figures) == ["Tandem", "again"]
    for [measured] in figures.values():
        assert measured["bursts: tok/s"] > 0
        assert 0 < measured["start s"] < 60
        assert measured["memory MiB"] > 500
    assert "32 at once, 64 → 64: tok/s" in done.stdout


def test_a_peer_that_cannot_be_started_is_told() -> None:
    assert "must look like name=command with {port} in it" in run("--peer", "vllm=vllm serve").stderr
