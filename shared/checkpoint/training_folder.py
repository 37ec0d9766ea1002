"""Folders as DeepSpeed's training writes them.

    FOLDER/latest                                    the tag of the newest checkpoint
    FOLDER/TAG/mp_rank_RR_model_states.pt            the state dict of tensor-parallel rank RR, as 'module' or 'model'

The tag is part of the path. (DeepSpeed's own inference reads `latest` and then looks into FOLDER.)
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint.contract import (
    CheckpointError,
    PipelineCheckpointError,
    UnsupportedCheckpointError,
)
from shared.checkpoint.megatron import flattened
from shared.checkpoint.pickle import check_allowed, load_pickle
from shared.checkpoint.state_dict import StateDictCheckpoint, unwrapped

LATEST_NAME = "latest"
_MAX_TAG_BYTES = 4096
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
# The stages of a PipelineModule have a file for each layer.
_LAYER = re.compile(r"layer_\d+-(model_\d+-)?model_states\.pt")
_EXPERT = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt")
_ZERO = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


@dataclass(frozen=True)
class TrainingFile:
    """One rank's file. version: of Megatron's checkpoint, 0 where it says none."""

    state: StateDictCheckpoint
    version: object


def tagged(folder: Path, tag: str | None = None) -> Path:
    """The folder of a tag, or of the one that `latest` names; without either, the folder itself.

    Raises CheckpointError for a tag that is not there or leads out of the folder.
    """
    latest = folder / LATEST_NAME
    source = "the tag"
    if tag is None:
        if not latest.is_file():
            return folder
        if latest.stat().st_size > _MAX_TAG_BYTES:
            raise CheckpointError(f"{latest} is no tag: it has {latest.stat().st_size} bytes")
        tag, source = latest.read_text(encoding="utf-8", errors="replace").strip(), str(latest)
    path = Path(os.path.normpath(folder / tag))
    if not tag or "\0" in tag or not path.is_relative_to(os.path.normpath(folder)) or path == folder:
        raise CheckpointError(f"{source} {tag!r} is no folder in {folder}")
    if not path.is_dir():
        raise CheckpointError(f"{source} {tag!r}: there is no {path}")
    return path


def rank_files(folder: Path) -> tuple[Path, ...]:
    """The files of all ranks, rank 0's first; none if it is no such folder.

    Raises PipelineCheckpointError for the stages of a pipeline, UnsupportedCheckpointError for experts and ZeRO's
    parts, and CheckpointError naming a rank that is missing.
    """
    names = sorted(path.name for path in folder.iterdir())
    if any(_LAYER.fullmatch(name) for name in names):
        raise PipelineCheckpointError
    found = {int(match[1]): folder / match[0] for name in names if (match := _RANK.fullmatch(name))}
    for pattern, what in ((_EXPERT, "experts' files"), (_ZERO, "ZeRO's parts, to be joined by its zero_to_fp32.py")):
        odd = next((name for name in names if pattern.fullmatch(name)), None)
        if odd and (pattern is _EXPERT or not found):
            raise UnsupportedCheckpointError(f"{folder} holds {what}, which are not read: {odd}")
    missing = set(range(max(found, default=-1) + 1)) - found.keys()
    if missing:
        raise CheckpointError(
            f"{folder} lacks the file of rank {min(missing)}: mp_rank_{min(missing):02d}_model_states.pt"
        )
    return tuple(found[rank] for rank in range(len(found)))


def read_training_files(paths: tuple[Path, ...], *, allow_pickle: bool) -> list[TrainingFile]:
    """The state dicts of a group's files, nested ones as dotted names.

    Raises CheckpointError if the files say that their number is another.
    """
    files = []
    for path in paths:
        check_allowed(path, allow_pickle)
        loaded = load_pickle(path)
        values = dict(flattened(unwrapped(loaded, str(path))))
        assert isinstance(loaded, Mapping)
        count = loaded.get("mp_world_size", len(paths))
        if count != len(paths):
            raise UnsupportedCheckpointError(
                f"{path}: checkpoint count {len(paths)} is different from saved mp_world_size {count}"
            )
        state = StateDictCheckpoint(values, str(path), path.stat().st_size)
        files.append(TrainingFile(state, loaded.get("checkpoint_version", 0)))
    odd = next((index for index, file in enumerate(files) if file.version != files[0].version), None)
    if odd is not None:
        raise CheckpointError(
            f"{paths[0]} has checkpoint_version {files[0].version!r}, and {paths[odd]} {files[odd].version!r}"
        )
    return files
