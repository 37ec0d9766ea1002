"""The packed weights of a model in one file of the cache, which every worker of the host maps.

So a host holds them in memory once, however many workers it runs, and the next start has nothing to pack. The file is
`$XDG_CACHE_HOME/tandem/packed/<key>.safetensors`; the key is of all that decides its bytes.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

# Raised whenever the kernels come to pack a weight in another way.
FORMAT = 3
# What a model's files must hold for it: smaller models are packed faster than a file is written.
MIN_BYTES = 16 << 20


def share_packed(parts: tuple[str, ...], pack: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `pack` makes, mapped from the file that was written when they were first made.

    parts: what decides the tensors, such as the model's digest and how they are packed. Of processes that start at once
    one packs and the others wait for it. Where the file cannot be written, each keeps its own copy, and says so.
    """
    path = _cache_dir() / f"{hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if (mapped := _open(path)) is not None:
                return mapped
            tensors = pack()
            _write(path, tensors)
            return _open(path) or tensors
    except OSError as error:
        log.warning("the packed weights are not shared with other workers, %s cannot be used: %s", path, error)
        return pack()


def _cache_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tandem" / "packed"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> dict[str, Tensor] | None:
    """Every tensor, backed by the mapped file; None if there is none, or it is not whole."""
    if not path.is_file():
        return None
    try:
        file = safe_open(path, framework="pt", device="cpu")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except SafetensorError as error:
        log.warning("%s is not whole and is made again: %s", path, error)
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = path.with_suffix(".unfinished")  # one name: what a killed process left is overwritten
    try:
        save_file(tensors, unfinished)
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {unfinished}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
