"""The compiled library: cached, rebuilt when its inputs change, and a plain message where it cannot be built."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from kernels.cpu import library


def test_it_is_built_once_and_shares_torchs_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-Wall", "-Wextra", "-Werror"))
    built = library.build()
    assert built.parent == tmp_path / "tandem" / "kernels"
    assert [path.name for path in built.parent.iterdir()] == [built.name], "nothing half built stays behind"
    made = built.stat().st_mtime_ns
    assert library.build() == built
    assert built.stat().st_mtime_ns == made
    ctypes.CDLL(str(built))
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1


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
