"""What a checkpoint is to those who load it: parameters by name, whatever files they lie in.

Files are mapped, so a parameter takes memory only from `tensor(name)` until the caller drops it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from kernels.quantization import Integers
from shared.model_files import ModelError


class CheckpointError(ModelError):
    """A weight file cannot be read, or lacks or has too many parameters; the message names them."""


class UnsupportedCheckpointError(CheckpointError, AssertionError):
    """A checkpoint of a form that is not read. Who expects DeepSpeed's AssertionError catches it too."""


class PipelineCheckpointError(CheckpointError, RuntimeError):
    """The checkpoint of a pipeline of stages. Who expects DeepSpeed's RuntimeError catches it too."""

    def __init__(self) -> None:
        super().__init__("pipeline parallelism is currently not supported in inference.")


class Checkpoint(Protocol):
    """Parameters by name; KeyError for a wrong one."""

    def names(self) -> set[str]: ...

    def tensor(self, name: str) -> Tensor:
        """In the stored shape and dtype; what is stored as integers: float32."""
        ...

    def integers(self, name: str) -> Integers | None:
        """As it is stored, if it is stored as integers that the linears take."""
        ...


@runtime_checkable
class OnDisk(Protocol):
    """A checkpoint that knows its files."""

    def file_of(self, name: str) -> str:
        """The file, or files, that a parameter lies in."""
        ...


def place_of(checkpoint: Checkpoint, *names: str) -> str:
    """For errors: ` in FILE`, or nothing where parameters lie in no file."""
    if not isinstance(checkpoint, OnDisk):
        return ""
    files = sorted({checkpoint.file_of(name) for name in names} - {""})
    return f" in {', '.join(files)}" if files else ""


def some_of(names: Sequence[str]) -> str:
    """The first few names, for errors."""
    return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"


def check_names(present: set[str], expected: set[str], ignored: Iterable[str] = ()) -> None:
    """CheckpointError naming the parameters that are missing or that the decoder would leave unused.

    `ignored` are regular expressions of names that may be there without being expected.
    """
    missing = sorted(expected - present)
    unused = sorted(name for name in present - expected if not any(re.fullmatch(rule, name) for rule in ignored))
    problems = [
        f"{len(names)} {what} ({some_of(names)})"
        for what, names in (("missing", missing), ("not expected by this family", unused))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint's parameters do not fit its config.json: {'; '.join(problems)}")
