"""`tandem doctor` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kernels.cpu import library
from shared.doctor.examination import CHECKS
from tests.shared.doctor.places import IMPORT_PATH, ROOT


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "doctor", *arguments]
    env = {**os.environ, "PYTHONPATH": IMPORT_PATH, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_this_host_is_fit_and_the_instructions_are_named() -> None:
    done = run_doctor("--no-cluster")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cpu ops: {library.instruction_set()}" in done.stdout
    assert library.instruction_set() in ("AVX-512 BF16", "AVX-512", "AVX2", "portable C")
    groups = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert groups == list(CHECKS), "no cluster was asked"


def test_an_error_sets_the_status_and_json_has_every_field(tmp_path: Path) -> None:
    (tmp_path / "tandem.yaml").write_text("auth: {cluster_key: swordfish}\n")
    done = run_doctor(
        *("--json", "--cluster", "--config", str(tmp_path / "tandem.yaml"), "--set", "device=cpu"),
        *(
            "--set",
            "gateway.port=1",
            "--set",
            "gateway.prefill_workers=a..b:1",
            "--set",
            "gateway.decode_workers=c..d:1",
        ),
    )
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert all(set(finding) == {"check", "level", "message", "remedy"} for finding in findings)
    assert all(bool(finding["remedy"]) == (finding["level"] != "ok") for finding in findings)
    amiss = [finding for finding in findings if finding["level"] == "error"]
    assert [finding["check"] for finding in amiss] == ["answers"] * 3
    assert "gateway.prefill_workers names a..b:1" in amiss[0]["message"]
    assert "swordfish" not in done.stdout + done.stderr


def test_a_wrong_key_is_named_and_the_status_is_2() -> None:
    done = run_doctor("--set", "decode.max_runing=3")
    assert done.returncode == 2
    assert "decode.max_runing: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
