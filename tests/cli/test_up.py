"""`./tandem up` with real processes: ready, serving, and nothing left behind."""

import json
import os
import re
import select
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def up(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running service and its ready text."""
    command = [ROOT / "tandem", "up", "--port", "0", "--set", "drain_s=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, read(process.stdout, "Ctrl-C stops it.")
        except AssertionError:
            process.kill()
            print(process.communicate()[1])
            raise
        finally:
            process.kill()


def read(stream: IO[str] | None, *texts: str) -> str:
    """What comes on a pipe until all the texts were in it; without texts what is there already."""
    assert stream
    seen = ""
    while select.select([stream], [], [], 100 if texts else 0)[0] and (data := os.read(stream.fileno(), 4096)):
        seen += data.decode()
        if texts and all(text in seen for text in texts):
            return seen
    assert not texts, f"no {texts} in {seen!r}"
    return seen


def members(process: subprocess.Popen[str]) -> dict[int, str]:
    """The children by process id, each with its role."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        found[os.pidfd_open(int(pid))] = command[command.index("-m") + 1]
    return found


def ended(handles: dict[int, str], timeout_s: float) -> bool:
    """Whether all the processes end in time; closes the handles."""
    done = [bool(select.select([handle], [], [], timeout_s)[0]) for handle in handles]
    for handle in handles:
        os.close(handle)
    return all(done)


# tests/e2e/test_serve.py interrupts one too
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing(number: signal.Signals, tiny_model: Callable[[str], Path]):
    flags = ("--model", str(tiny_model("llama")), "--prefill", "2", "--dtype", "float32", "--quantization", "int8")
    with up(*flags) as (process, text):
        children = members(process)
        assert sorted(children.values()) == ["decode_worker", "gateway", "prefill_worker", "prefill_worker"]
        address = re.search(r"gRPC (\S+)", text)[1]
        url = re.search(r"curl (\S+)/v1", text)[1]
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as reply:
            assert reply.status == 200
        command = [ROOT / "tandem", "generate", "hi", "--address", address, "--max-tokens", "4"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        process.send_signal(number)
        assert process.wait(30) == 0
        assert ended(children, timeout_s=0)


def test_without_prefill_workers_the_others_do_both_phases(tiny_model: Callable[[str], Path]):
    flags = ("--model", str(tiny_model("llama")), "--prefill", "0", "--set", "decode.batch_tokens=96")
    with up(*flags) as (process, text):
        children = members(process)
        assert sorted(children.values()) == ["decode_worker", "gateway"]
        address = re.search(r"gRPC (\S+)", text)[1]
        command = [ROOT / "tandem", "generate", "hi", "--address", address, "--max-tokens", "4", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert ended(children, timeout_s=0)


@pytest.mark.slow  # tests/e2e/test_serve.py kills one with requests running
def test_its_processes_end_when_it_is_killed(tiny_model: Callable[[str], Path]):
    with up("--model", str(tiny_model("llama"))) as (process, _):
        children = members(process)
        assert len(children) == 3
        process.kill()
        assert ended(children, timeout_s=30)


@pytest.mark.slow  # tests/cli/test_supervisor.py and tests/e2e/test_faults_recovery.py have workers come back
def test_a_worker_that_dies_comes_back_and_the_service_goes_on(tiny_model: Callable[[str], Path]):
    with up("--model", str(tiny_model("llama"))) as (process, text):
        children = members(process)
        (decode,) = [handle for handle, role in children.items() if role == "decode_worker"]
        read(process.stderr)
        signal.pidfd_send_signal(decode, signal.SIGKILL)
        read(process.stderr, "decode-0  | is back", "is alive")
        address = re.search(r"gRPC (\S+)", text)[1]
        command = [ROOT / "tandem", "generate", "hi", "--address", address, "--max-tokens", "4"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert ended(children, timeout_s=0)


def test_an_unknown_model_is_told_before_anything_starts():
    command = [ROOT / "tandem", "up", "--port", "0", "--model", "no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
