"""The compiled library: cached, rebuilt when its inputs change, and a plain message where it cannot be built."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.cpu import library
from kernels.gather import gather
from kernels.linear import LinearWeight, linear

WARNINGS = ("-Wall", "-Wextra", "-Werror")


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it: the whole takes ten times as long."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in (*library.SOURCE_DIR.glob("*.h"), *(library.SOURCE_DIR / name for name in ("gather.c", "team.c"))):
        shutil.copy(path, sources)
    monkeypatch.setattr(library, "SOURCE_DIR", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, *WARNINGS))
    built = library.build()
    assert built.parent == tmp_path / "tandem" / "kernels"
    assert [path.name for path in built.parent.iterdir()] == [built.name], "nothing half built stays behind"
    made = built.stat().st_mtime_ns
    assert library.build() == built
    assert built.stat().st_mtime_ns == made
    ctypes.CDLL(str(built))


def test_no_source_has_a_warning() -> None:
    sources = sorted(library.SOURCE_DIR.glob("*.c"))
    assert len(sources) > 5
    library._run([["gcc", *library.FLAGS, *WARNINGS, "-fsyntax-only", *map(str, sources)]])


@pytest.mark.slow
def test_no_source_has_a_warning_once_optimized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, *WARNINGS))
    ctypes.CDLL(str(library.build()))


def test_a_machine_without_gcc_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install gcc"):
        library.build()


def test_a_failing_compiler_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-fno-such-flag"))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        library.build()
    assert list((tmp_path / "tandem" / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="set XDG_CACHE_HOME"):
        library.build()


def test_a_replay_runs_what_was_recorded_on_the_inputs_of_the_moment() -> None:
    table, rows, swapped = torch.arange(12.0).view(4, 3), torch.tensor([3, 0]), torch.tensor([1, 0])
    first, second = torch.zeros(2, 3), torch.zeros(2, 3)
    with library.record() as replay:
        gather(table, rows, out=first)
        gather(first, swapped, out=second)
    assert not first.any(), "recording runs nothing"
    replay()
    assert torch.equal(second, table[[0, 3]])
    rows[0] = 2
    replay()
    assert torch.equal(second, table[[0, 2]])


def test_a_replay_names_the_op_that_refuses_its_arguments() -> None:
    table, rows, out = torch.zeros(4, 3), torch.tensor([0]), torch.zeros(1, 3)
    with library.record() as replay:
        gather(table, rows, out=out)
    rows[0] = 4
    with pytest.raises(RuntimeError, match="call 1 of 1, tandem_gather"):
        replay()


def test_a_thread_records_its_own_calls_alone() -> None:
    table, rows = torch.arange(4.0).view(4, 1), torch.tensor([2])
    with library.record() as replay, ThreadPoolExecutor(1) as other:
        assert other.submit(gather, table, rows).result().item() == 2
    assert not replay.calls


def test_threads_that_call_at_once_get_their_own_results() -> None:
    """One caller has the helpers, the others work alone; more threads than cores, so that helpers are often late."""
    weight = LinearWeight(torch.randn(640, 256))
    x = [torch.randn(rows, 256) for rows in (1, 7, 40, 300)]
    expected = [linear(one, weight) for one in x]

    def repeat(index: int) -> bool:
        torch.set_num_threads(1 + index)
        return all(torch.equal(linear(x[index], weight), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(repeat, range(4)))


def test_a_fork_goes_on_without_the_helpers() -> None:
    code = """
import os, torch
from kernels.linear import LinearWeight, linear
torch.set_num_threads(4)
weight, x = LinearWeight(torch.randn(640, 256)), torch.randn(64, 256)
expected = linear(x, weight).numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if linear(x, weight).numpy().tobytes() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": "."}, check=True, timeout=60
    )
