"""Compiles kernels/cpu/*.c with gcc at first use and loads the result with ctypes, which releases the GIL in each call.

The library is cached as `$XDG_CACHE_HOME/tandem/kernels/<hash>.so`, the hash being of the sources, the flags, the
compiler's version and the CPU's features, so that an edit, another compiler or another host builds its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch  # noqa: F401 - loads its OpenMP runtime, which the library then shares

SOURCE_DIR = Path(__file__).parent
# -ffp-contract=off: sums are fused only where the source says so, which is what makes a row's bits its own (simd.h).
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fPIC", "-Wno-psabi")

_lock = threading.Lock()
_CTYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


@functools.cache
def function(name: str, arguments: str) -> Callable[..., int]:
    """The C function `name`, returning an int64. `arguments` has one letter each: p pointer, i int64, d double.

    Raises RuntimeError when the library cannot be built.
    """
    with _lock:
        symbol = getattr(_library(), name)
    symbol.argtypes = [_CTYPES[letter] for letter in arguments]
    symbol.restype = ctypes.c_int64
    return symbol


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def build() -> Path:
    """The compiled library's path, compiled now unless cached. Raises RuntimeError naming what is missing."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the CPU ops are compiled at first use and gcc was not found on PATH: install gcc")
    sources = sorted(SOURCE_DIR.glob("*.c"))
    target = _cache_dir() / f"{_fingerprint(compiler, sources)}.so"
    if not target.exists():
        _compile(compiler, sources, target)
    return target


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tandem" / "kernels"


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in [*sources, *sorted(SOURCE_DIR.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    for part in (version, " ".join(FLAGS).encode(), _cpu_features().encode(), str(_openmp_runtime()).encode()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    """What -march=native depends on: the CPU's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _openmp_runtime() -> Path | None:
    """The libgomp that torch has loaded. Linked against the same file, our loops run on torch's own thread pool."""
    try:
        mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    return next((Path(path) for path in sorted(mapped) if Path(path).name.startswith("libgomp")), None)


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Compiles each source beside the others, links, and renames: readers see the whole library or none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix="build-")
    except OSError as error:
        raise RuntimeError(f"cannot write the kernel cache {target.parent}: {error}; set XDG_CACHE_HOME") from error
    with scratch as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        pairs = zip(sources, objects, strict=True)
        _run([[compiler, *FLAGS, "-c", str(source), "-o", str(made)] for source, made in pairs])
        runtime = _openmp_runtime()
        openmp = [str(runtime)] if runtime else ["-fopenmp"]
        library = Path(folder) / target.name
        _run([[compiler, "-shared", *map(str, objects), *openmp, "-lm", "-o", str(library)]])
        library.replace(target)


def _run(commands: list[list[str]]) -> None:
    """Runs all commands at once. Raises RuntimeError with the first failing one's own message."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = [process.communicate()[1] for process in running]
    for process, command, message in zip(running, commands, messages, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}:\n{message.strip()}")
