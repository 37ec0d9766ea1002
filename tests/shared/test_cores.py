"""The board on which the workers of a host say what they compute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernels.cpu import library
from shared import cores as module
from shared.cores import SLOTS, Cores
from tests.namespaces import Network, in_the_way

# Another worker: computes, with two prompts, until it is killed.
OTHER = """
import sys
from pathlib import Path
from shared.cores import Cores
cores = Cores.join(Path(sys.argv[1]))
cores.prompts = 2
with cores.computing():
    print("computes", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def shares_nothing_afterwards() -> Iterator[None]:
    yield
    library.call("tandem_share_cores", None, 0, 0)


@contextmanager
def computing(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "computes\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with computing([sys.executable, "-c", OTHER, str(tmp_path)]) as process:
        yield process


def allowed() -> int:
    return library.call("tandem_allowed_threads")


def test_alone_a_worker_uses_every_core(tmp_path: Path) -> None:
    cores = Cores.join(tmp_path)
    with cores.computing():
        assert allowed() > len(os.sched_getaffinity(0))
    assert cores.pause_s(0.01, 1, 1.0) == 0


def test_a_worker_that_cannot_be_seen_keeps_its_place(tmp_path: Path) -> None:
    """In another PID namespace all its numbers are others: who took it for dead would wipe it off, and it them."""
    if reason := in_the_way():
        pytest.skip(f"this host gives us no namespaces: {reason}")
    with Network() as network:
        command = network.command("10.77.0.2", [sys.executable, "-c", OTHER, str(tmp_path)], folders=[tmp_path])
        with computing(command):
            [board] = tmp_path.glob("cores-*")
            before = board.read_bytes()
            cores = Cores.join(tmp_path)
            assert cores.pause_s(0.01, 1, 1.0) == 0
            cores.leave()
            assert any(before)
            assert board.read_bytes() == before


def test_workers_that_compute_at_once_have_their_parts(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    cores = Cores.join(tmp_path)
    assert allowed() > len(os.sched_getaffinity(0)), "one computes"
    with cores.computing():
        assert allowed() == max(1, len(os.sched_getaffinity(0)) // 2)
    assert cores.pause_s(0.01, 2, 1.0) == pytest.approx(0.04)
    assert cores.pause_s(0.01, 1, 1.0) == pytest.approx(0.08)
    assert cores.pause_s(0.01, 8, 1.0) == pytest.approx(0.04 * (2 / 8) ** 3)
    assert cores.pause_s(0.01, 1, 0.015) == 0.015
    cores.prompts = 5
    assert cores.pause_s(0.01, 2, 1.0) == pytest.approx(0.04), "its own prompts are its own affair"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_was_killed_is_wiped_off(
    tmp_path: Path, other: subprocess.Popen[str], end: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    cores = Cores.join(tmp_path)
    other.send_signal(end)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    with cores.computing():
        assert allowed() > len(os.sched_getaffinity(0))
    assert cores.pause_s(0.01, 1, 1.0) == 0


def test_a_full_board_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    joined = [Cores.join(tmp_path) for _ in range(SLOTS)]
    assert not caplog.text
    late = Cores.join(tmp_path)
    assert "not shared with other workers of this host: 64 workers share these cores already" in caplog.text
    joined[0].prompts = 3
    assert late.pause_s(0.01, 1, 1.0) == 0
    joined[1].leave()
    assert Cores.join(tmp_path).pause_s(0.01, 1, 1.0) == pytest.approx(0.12)


def test_a_folder_of_others_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    Cores.join()
    assert not caplog.text
    (tmp_path / f"tandem-{os.getuid()}").chmod(0o777)
    Cores.join()
    assert "must be a folder that only its owner can write to" in caplog.text


def test_the_last_to_leave_removes_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    folder.mkdir()
    first, second = Cores.join(folder), Cores.join(folder)
    first.leave()
    assert len(list(folder.iterdir())) == 1
    second.leave()
    assert not folder.exists()
