"""Files of torch.save: tensors and plain containers, and never code."""

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import CheckpointError
from shared.checkpoint.joined import JoinedCheckpoint
from shared.checkpoint.state_dict import StateDictCheckpoint, is_wrapped, unwrapped

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class PickleCheckpoint:
    """Files of torch.save with a state dict each, as it is or as 'module' or 'model' of a training engine's file."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._files = JoinedCheckpoint([_state_dict(path) for path in paths])

    def names(self) -> set[str]:
        return self._files.names()

    def file_of(self, name: str) -> str:
        return self._files.file_of(name)

    def tensor(self, name: str) -> Tensor:
        return self._files.tensor(name)

    def integers(self, name: str) -> Integers | None:
        return self._files.integers(name)


def check_allowed(path: Path, allow_pickle: bool) -> None:
    """CheckpointError unless pickle may be read."""
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is pickle, which can run code: pass --allow-pickle (to init_inference: "
            "checkpoint_config.allow_pickle) if you trust its source"
        )


def load_pickle(path: Path) -> object:
    """What torch.save wrote, by `weights_only=True` and by nothing else; tensors are mapped where the format allows.

    Raises CheckpointError naming the file, and what of it is neither a tensor nor a plain container.
    """
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError:
        raise
    # torch says what it did not like by any of a dozen types
    except Exception as error:
        raise CheckpointError(f"{path} is not a plain torch checkpoint: {_reason(error)}") from error


def _state_dict(path: Path) -> StateDictCheckpoint:
    loaded = load_pickle(path)
    values = unwrapped(loaded, str(path)) if is_wrapped(loaded) else loaded
    return StateDictCheckpoint(values, str(path), path.stat().st_size)


def _check_archive(path: Path) -> None:
    """torch compresses nothing: an archive that does may become any size when it is read."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{path} is not a plain torch checkpoint: {entry.filename} is compressed")


def _reason(error: Exception) -> str:
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {refused[1]}, which is no tensor and is not unpickled"
    # torch's own text goes on for a page, and tells how to run the code
    own = re.search(r"WeightsUnpickler error: (.+)", text) or re.match(r"(.+)", text)
    return own[1] if own else "it is cut short"
