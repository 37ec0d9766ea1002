"""Compiles kernels/cpu/*.c with gcc at first use, calls its ops through ctypes (without the GIL), and records calls.

    call("tandem_gather", table.data_ptr(), rows.data_ptr(), out.data_ptr(), 4, 100, 1152)

    with record() as replay:       # what is called is written down, and does not run
        forward(static_inputs)
    replay()                       # runs it, in order, by one call into C

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
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE_DIR = Path(__file__).parent
# -ffp-contract=off: sums are fused only where the source says so, which is what makes a row's bits its own (simd.h).
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-pthread", "-ffp-contract=off", "-fPIC", "-Wno-psabi")

_lock = threading.Lock()
_recorder = threading.local()  # what `record` fills, on the thread that records


def call(name: str, *arguments: float | None) -> int:
    """Calls the op `name` and returns what it returns: 0, or what is wrong. None is a null pointer.

    Raises RuntimeError when the library cannot be built.
    """
    op = _op(name)
    packed = (ctypes.c_int64 * len(arguments))(*map(_word, arguments))
    calls = getattr(_recorder, "calls", None)
    if calls is None:
        return op(packed)
    calls.append((op, packed))
    return 0


def instruction_set() -> str:
    """What the ops were compiled for: AVX-512 BF16, AVX-512, AVX2 or portable C. Raises RuntimeError as `call`."""
    return ("portable C", "AVX2", "AVX-512", "AVX-512 BF16")[_op("tandem_instruction_set")(None)]


class Replay:
    """Calls of ops, to be repeated with the same arguments. What these point to must outlive it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ctypes.Array[ctypes.c_int64]]] = []  # the C function and its arguments
        self._arguments: ctypes.Array[ctypes.c_int64] | None = None

    def __call__(self) -> None:
        """Raises RuntimeError naming the op that refused its arguments; those before it have run."""
        if self._arguments is None:
            words = [
                word
                for op, packed in self.calls
                for word in (ctypes.cast(op, ctypes.c_void_p).value, ctypes.addressof(packed))
            ]
            self._list = (ctypes.c_int64 * len(words))(*words)
            self._arguments = (ctypes.c_int64 * 2)(ctypes.addressof(self._list), len(self.calls))
        failed = _op("tandem_replay")(self._arguments)
        if failed:
            op, _ = self.calls[failed - 1]
            raise RuntimeError(f"call {failed} of {len(self.calls)}, {op.__name__}, refused its arguments")


@contextmanager
def record() -> Iterator[Replay]:
    """Writes down the ops that this thread calls instead of running them. Nothing else becomes part of the replay."""
    replay = Replay()
    _recorder.calls = replay.calls
    try:
        yield replay
    finally:
        _recorder.calls = None


def is_recording() -> bool:
    """Whether ops that this thread calls are written down, and do not run."""
    return getattr(_recorder, "calls", None) is not None


def _word(argument: float | None) -> int:
    if type(argument) is int:
        return argument
    return 0 if argument is None else struct.unpack("q", struct.pack("d", argument))[0]


@functools.cache
def _op(name: str) -> Any:
    with _lock:
        op = getattr(_library(), name)
    op.argtypes = [ctypes.c_void_p]
    op.restype = ctypes.c_int64
    return op


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
    for part in (version, " ".join(FLAGS).encode(), _cpu_features().encode()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    """What -march=native depends on: the CPU's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


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
        library = Path(folder) / target.name
        _run([[compiler, "-shared", *map(str, objects), "-pthread", "-lm", "-o", str(library)]])
        library.replace(target)


def _run(commands: list[list[str]]) -> None:
    """Runs all commands at once. Raises RuntimeError with the first failing one's own message."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = [process.communicate()[1] for process in running]
    for process, command, message in zip(running, commands, messages, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}:\n{message.strip()}")
