"""The models on this machine: pulled into a cache once, used offline from then on.

    <root>/<name>/               a pulled model: its files, and manifest.json with their hashes
    <root>/.derived/<key>/       what was made from a model used in place, by path: hashes, converted tokenizer
    <root>/.tmp-*                a pull in progress; its lock file beside it tells it from a dead one's remains

A model appears under its name by one rename, after every byte of it was flushed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.model_files import (
    ModelError,
    ModelFiles,
    ModelNotFoundError,
    WeightKind,
    Weights,
    find_weights,
    hash_file,
    model_digest,
    read_json,
)
from shared.model_source import (
    BUILT_IN,
    Progress,
    Source,
    WheelModel,
    copy_small_files,
    fetch,
    folder_bytes,
    parse_source,
    small_files,
)

_MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PROJECT_ROOT = Path(__file__).resolve().parent.parent
# A tokenizer.json can be made from any one of these.
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelSummary:
    """One line of `tandem model list`; `pulled_at` in seconds since the epoch."""

    name: str
    source: str
    kind: WeightKind
    num_bytes: int
    digest: str
    folder: Path
    pulled_at: float


def default_root() -> Path:
    """$XDG_CACHE_HOME/tandem/models, which is ~/.cache/tandem/models unless it is set."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tandem" / "models"


def _no_progress(what: str, done: int, total: int | None) -> None:
    pass


class ModelStore:
    """Pull, list, show, remove and resolve models. Safe for several processes at once; every error is a ModelError."""

    def __init__(self, root: Path | None = None, *, built_in: Mapping[str, WheelModel] = BUILT_IN) -> None:
        self.root = (root or default_root()).absolute()
        self._built_in = built_in

    def pull(
        self,
        source: str,
        progress: Progress = _no_progress,
        *,
        name: str | None = None,
        allow_pickle: bool = False,
    ) -> ModelFiles:
        """Fetches a model unless it is here already; `progress(what, bytes_done, bytes_total)`.

        A model that is here is returned without any network call. A name taken by another source is an error.
        """
        held = self._find(name or source)
        if held is not None and held.source == source:
            return self._load(held.folder, allow_pickle)
        parsed = parse_source(source, self._built_in)
        target = self._folder(name or parsed.name)
        self._sweep()
        with self._locked(f".pull-{target.name}.lock"):
            held = self._find(name or parsed.name)
            if held is None:
                self._make(target, lambda folder, lock: self._fetch(parsed, folder, lock, progress, name, allow_pickle))
            elif held.source != parsed.location:
                raise ModelError(
                    f"the name {held.name} is taken by {held.source}: pull under another with --name, "
                    f"or `tandem model remove {held.name}` first"
                )
        return self._load(target, allow_pickle)

    def list(self) -> list[ModelSummary]:
        """All pulled models by name."""
        folders = sorted(self.root.glob("[!.]*")) if self.root.exists() else []
        return [self._summary(folder) for folder in folders if (folder / _MANIFEST).is_file()]

    def show(self, name: str) -> ModelSummary:
        """One pulled model; ModelNotFoundError if it is not here."""
        held = self._find(name)
        if held is None:
            raise self._not_found(name)
        return held

    def remove(self, name: str) -> int:
        """Deletes a pulled model, and returns the bytes freed. Processes that have it open keep what they mapped."""
        held = self.show(name)
        with self._locked(f".pull-{held.folder.name}.lock"), self._locked(".lock"):
            trash = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root)) / "removed"
            try:
                held.folder.rename(trash)
            except FileNotFoundError:
                raise self._not_found(name) from None
            num_bytes = folder_bytes(trash)
            shutil.rmtree(trash.parent)
        return num_bytes

    def resolve(self, name_or_path: str, *, allow_pickle: bool = False) -> ModelFiles:
        """A pulled model by name, or a folder or .gguf file by path, which is used where it lies. No network call."""
        held = self._find(name_or_path)
        if held is not None:
            return self._load(held.folder, allow_pickle)
        path = Path(name_or_path).expanduser()
        if not path.exists() or name_or_path in self._built_in:
            raise self._not_found(name_or_path)
        return self._derive(parse_source(str(path), self._built_in), allow_pickle)

    # -- reading --------------------------------------------------------------------------------------------------

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ModelError(f"{name!r} cannot be a model's name: letters, digits, '.', '_', '-' and one '/'")
        return self.root / name.replace("/", "--")

    def _find(self, name: str) -> ModelSummary | None:
        if not _NAME.fullmatch(name):
            return None
        folder = self._folder(name)
        return self._summary(folder) if (folder / _MANIFEST).is_file() else None

    def _summary(self, folder: Path) -> ModelSummary:
        manifest = read_json(folder / _MANIFEST)
        return ModelSummary(
            name=str(manifest["name"]),
            source=str(manifest["source"]),
            kind=manifest["kind"],  # type: ignore[arg-type]
            num_bytes=folder_bytes(folder),
            digest=str(manifest["digest"]),
            folder=folder,
            pulled_at=float(str(manifest["made_at"])),
        )

    def _load(self, folder: Path, allow_pickle: bool) -> ModelFiles:
        manifest = read_json(folder / _MANIFEST)
        if manifest["kind"] == "pickle" and not allow_pickle:
            raise ModelError(f"{manifest['name']} holds its weights as pickle: pass --allow-pickle if you trust them")
        paths = []
        for entry in manifest["weights"]:  # type: ignore[attr-defined]
            path = folder / entry["path"]
            if not _unchanged(path, entry) and (not path.is_file() or hash_file(path) != entry["sha256"]):
                raise ModelError(
                    f"{path} is damaged: `tandem model remove {manifest['name']}`, then pull the model again"
                )
            paths.append(path)
        weights = Weights(manifest["kind"], tuple(paths))  # type: ignore[arg-type]
        return ModelFiles(str(manifest["name"]), folder, weights, str(manifest["digest"]))

    def _not_found(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"no model {name!r} here: `tandem model pull {name}` (`tandem model list` shows all)")

    # -- making ---------------------------------------------------------------------------------------------------

    def _fetch(
        self, source: Source, folder: Path, lock: int, progress: Progress, name: str | None, allow_pickle: bool
    ) -> None:
        fetch(source, folder, progress, allow_pickle=allow_pickle, built_in=self._built_in, keep_open=(lock,))
        weights = find_weights(folder, allow_pickle=allow_pickle)
        _complete(folder, folder, weights, progress)
        _write_manifest(folder, name or source.name, source.location, weights, progress)

    def _derive(self, source: Source, allow_pickle: bool) -> ModelFiles:
        """Hashing and converting a model used by path is done once, as long as its files do not change."""
        origin = Path(source.location)
        weights = Weights("gguf", (origin,))
        small: list[Path] = []
        if source.kind == "folder":
            weights, small = find_weights(origin, allow_pickle=allow_pickle), small_files(origin)
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*small, *weights.paths)]
        key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]
        target = self.root / ".derived" / key
        with self._locked(".derive.lock"):
            if not (target / _MANIFEST).is_file():
                self._sweep()

                def make(folder: Path, lock: int) -> None:
                    if source.kind == "folder":
                        copy_small_files(origin, folder)
                    _complete(folder, origin, weights, _no_progress)
                    _write_manifest(folder, source.name, source.location, weights, _no_progress)

                self._make(target, make)
                self._prune(target, source.location)
        return self._load(target, allow_pickle)

    def _prune(self, kept: Path, location: str) -> None:
        """What was made from an earlier state of these files, or from files that are gone, is of no use any more."""
        for folder in kept.parent.iterdir():
            if folder != kept and (folder / _MANIFEST).is_file():
                source = str(read_json(folder / _MANIFEST)["source"])
                if source == location or not Path(source).exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def _make(self, target: Path, fill: Callable[[Path, int], None]) -> None:
        """Fills a temporary folder, flushes it and renames it to `target`. `fill` gets the folder and its lock."""
        with self._locked(".lock"):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))
            lock_path = folder.with_name(folder.name + ".lock")
            lock = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            fill(folder, lock)
            folder.chmod(0o755)
            _flush(folder)
            folder.rename(target)
            _flush_entry(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)
            os.close(lock)

    def _sweep(self) -> None:
        """Removes what killed pulls left. Whoever works in a folder holds its lock, and the kernel lets go of it."""
        with self._locked(".lock"):
            for name in {path.name.removesuffix(".lock") for path in self.root.glob(".tmp-*")}:
                lock_path = self.root / f"{name}.lock"
                with lock_path.open("a") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    shutil.rmtree(self.root / name, ignore_errors=True)
                    lock_path.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / name).open("a")
        except OSError as error:
            raise ModelError(f"cannot write to {self.root}: {error.strerror}; set XDG_CACHE_HOME") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _complete(folder: Path, origin: Path, weights: Weights, progress: Progress) -> None:
    """Makes in `folder` the small files that the model in `origin` came without."""
    if weights.kind == "gguf":
        if not (folder / "config.json").exists() or not (folder / "tokenizer.json").exists():
            _convert("gguf", weights.paths[0], folder, progress)
    elif not (folder / "config.json").exists():
        raise ModelError(f"{origin} has no config.json: it is not a Hugging Face model folder")
    elif not (folder / "tokenizer.json").exists():
        if not any((folder / name).exists() for name in _SLOW_TOKENIZERS):
            raise ModelError(f"{origin} has no tokenizer.json, nor {', '.join(_SLOW_TOKENIZERS)} to make one from")
        _convert("tokenizer", folder, folder, progress)


def _convert(what: str, source: Path, folder: Path, progress: Progress) -> None:
    progress("converting", 0, None)
    paths = [str(_PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "shared.model_convert", what, str(source), str(folder)],
        cwd=_PROJECT_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"cannot make config and tokenizer of {source}: {reason}")


def _write_manifest(folder: Path, name: str, source: str, weights: Weights, progress: Progress) -> None:
    entries, done = [], 0
    for path in weights.paths:
        progress("hashing", done, weights.num_bytes)
        status = path.stat()
        done += status.st_size
        entries.append(
            {
                "path": path.name if path.parent == folder else str(path),
                "num_bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "sha256": hash_file(path),
            }
        )
    progress("hashing", done, done)
    config = None if weights.kind == "gguf" else read_json(folder / "config.json")
    manifest = {
        "name": name,
        "source": source,
        "kind": weights.kind,
        "weights": entries,
        "digest": model_digest(config, [entry["sha256"] for entry in entries]),
        "made_at": time.time(),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _unchanged(path: Path, entry: dict[str, object]) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_size == entry["num_bytes"] and status.st_mtime_ns == entry["mtime_ns"]


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
