"""The description of a checkpoint as DeepSpeed has it: a JSON object, or a dictionary.

type              ds_model, bloom (as they are), Megatron (megatron.py)
checkpoints       a list of files, or {"tp": [...], "non_tp": [...]}
version           a number: of Megatron's fused rows; null = as the files say
parallelization   pp (default): all of the files are one model; tp: they are shards, part by part, a file of each
                      rank for every part
tp_size, mp_size  how many ranks the shards are of; all files of a list by default
base_dir          where the files lie; a relative one, or none: where the description lies
dtype             what the model was computed in; its tensors keep their own
cuts, sizes       ours: how each parameter is cut, and of which model (cuts.py)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast, get_args

from shared.checkpoint.contract import CheckpointError, UnsupportedCheckpointError
from shared.checkpoint.cuts import Cut, CutTable, Part, Sizes
from shared.checkpoint.megatron import version_of

_REQUIRED = ("type", "checkpoints", "version")
_KEYS = {*_REQUIRED, "parallelization", "tp_size", "mp_size", "base_dir", "dtype", "cuts", "sizes"}
_DTYPES = {
    name: dtype
    for dtype, names in {
        "float32": ("float32", "float", "fp32"),
        "float16": ("float16", "half", "fp16"),
        "bfloat16": ("bfloat16", "bfloat", "bf16"),
        "int8": ("int8",),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class Description:
    """A description that was checked. `tp` holds the files of each rank; without ranks, all files are `whole`."""

    type: Literal["model", "megatron"]
    version: int | float | None
    whole: tuple[Path, ...]
    tp: tuple[tuple[Path, ...], ...]
    dtype: str | None
    table: CutTable | None  # its own; None = it says nothing
    sizes: Sizes


def parse_description(data: Mapping[str, object], folder: Path, base_dir: str = "") -> Description:
    """A description whose relative paths are of `folder`; `base_dir` stands in for one that it does not give.

    Raises CheckpointError naming the key that is missing or wrong, and the path that leaves its folder;
    UnsupportedCheckpointError with DeepSpeed's text for another type.
    """
    for key in _REQUIRED:
        if key not in data:
            raise CheckpointError(f"the checkpoint description lacks {key!r}; type, checkpoints, version are needed")
    if unknown := sorted(map(str, data.keys() - _KEYS)):
        raise CheckpointError(f"the checkpoint description has {unknown[0]!r}; {', '.join(sorted(_KEYS))} are read")
    kind, files = _type(data["type"]), data["checkpoints"]
    parallelization = _text(data, "parallelization") or "pp"
    if parallelization not in ("pp", "tp"):
        raise CheckpointError(f"parallelization must be pp or tp, got {parallelization!r}")
    version = data["version"]
    if version is not None:
        version_of(version)
    where = _Files(folder, _text(data, "base_dir") or base_dir)
    table, sizes = _cuts(data)
    whole, tp = _whole_and_tp(where, files, kind, parallelization, _tp_size(data))
    return Description(kind, cast("int | float | None", version), whole, tp, _dtype(data), table, sizes)


class _Files:
    """Finds files of a description."""

    def __init__(self, folder: Path, base_dir: str) -> None:
        base = Path(base_dir)
        if base_dir and not base.is_absolute():
            # DeepSpeed's is of the folder that it was started in
            base = next((found for found in (folder / base, Path.cwd() / base) if found.is_dir()), folder / base)
        if base_dir and not base.is_dir():
            raise CheckpointError(f"base_dir {base_dir} is no folder")
        self._base, self._is_bound = (base, True) if base_dir else (folder, False)

    def of(self, names: object, key: str) -> tuple[Path, ...]:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise CheckpointError(f"{key} must be a list of file names")
        return tuple(self._file(name) for name in names)

    def _file(self, name: str) -> Path:
        """Without a base_dir a file may be named by its absolute path. Links are followed: caches are made of them."""
        path = Path(os.path.normpath(self._base / name))
        is_free = Path(name).is_absolute() and not self._is_bound
        if not is_free and not path.is_relative_to(os.path.normpath(self._base)):
            raise CheckpointError(f"{name} leaves {self._base}, where all files of the description must lie")
        if not path.is_file():
            raise CheckpointError(f"the checkpoint description names {name}, but there is no {path}")
        return path


def _whole_and_tp(
    where: _Files, files: object, kind: str, parallelization: str, tp_size: int | None
) -> tuple[tuple[Path, ...], tuple[tuple[Path, ...], ...]]:
    """The files that are no shards, and those of each rank."""
    whole: tuple[Path, ...] = ()
    if isinstance(files, Mapping):
        if kind == "megatron" or "tp" not in files or files.keys() - {"tp", "non_tp"}:
            raise CheckpointError(
                'checkpoints must be a list of files, or {"tp": [...], "non_tp": [...]} (not Megatron)'
            )
        whole, shards = where.of(files.get("non_tp", []), "non_tp"), where.of(files["tp"], "tp")
    else:
        shards = where.of(files, "checkpoints")
    if not shards:
        raise CheckpointError("checkpoints names no file")
    if kind == "model" and parallelization == "pp" and not isinstance(files, Mapping):
        return shards, ()
    ranks = tp_size or len(shards)
    if len(shards) % ranks or (kind == "megatron" and len(shards) != ranks):
        raise CheckpointError(f"{len(shards)} files are not those of tp_size {ranks}")
    # part by part, each with a file of every rank
    return whole, tuple(shards[rank::ranks] for rank in range(ranks))


def _type(kind: object) -> Literal["model", "megatron"]:
    if isinstance(kind, str) and kind.lower() in ("ds_model", "bloom"):
        return "model"
    if kind == "Megatron":
        return "megatron"
    raise UnsupportedCheckpointError(f"{kind} checkpoint type is not supported")


def _text(data: Mapping[str, object], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise CheckpointError(f"{key} must be a string, got {value!r}")
    return value


def _tp_size(data: Mapping[str, object]) -> int | None:
    given = {key: data[key] for key in ("tp_size", "mp_size") if key in data}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{key} must be at least 1, got {value!r}")
    sizes = cast("set[int]", set(given.values()))
    if len(sizes) > 1:
        raise CheckpointError(f"tp_size and mp_size are the same thing: {data['tp_size']} and {data['mp_size']} differ")
    return next(iter(sizes), None)


def _dtype(data: Mapping[str, object]) -> str | None:
    given = _text(data, "dtype")
    if given and given.removeprefix("torch.") not in _DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(dict.fromkeys(_DTYPES.values()))}, got {given!r}")
    return _DTYPES[given.removeprefix("torch.")] if given else None


def _cuts(data: Mapping[str, object]) -> tuple[CutTable | None, Sizes]:
    """The cuts that we write beside DeepSpeed's keys."""
    given, cuts = data.get("sizes", {}), data.get("cuts")
    known = {field.name for field in fields(Sizes)}
    if not isinstance(given, Mapping) or given.keys() - known:
        raise CheckpointError(f"sizes must be an object of {', '.join(sorted(known))}")
    try:
        sizes = Sizes(**given)
    except ValueError as error:
        raise CheckpointError(f"sizes: {error}") from error
    if cuts is None:
        return None, sizes
    if not isinstance(cuts, Mapping):
        raise CheckpointError("cuts must be an object of parameters")
    return CutTable(sizes=sizes, named={str(name): _cut(str(name), cut) for name, cut in cuts.items()}), sizes


def _cut(name: str, cut: object) -> Cut:
    if isinstance(cut, Mapping) and cut.keys() <= {"dim", "parts"}:
        dim, parts = cut.get("dim"), cut.get("parts", ["even"])
        if isinstance(parts, list) and parts and all(part in get_args(Part) for part in parts):
            alone = "vocabulary" not in parts or len(parts) == 1
            if dim in (0, 1, None) and not isinstance(dim, bool | float) and alone:
                return Cut(dim, tuple(parts))
    raise CheckpointError(f"cuts: {name} is cut by {cut!r}, which is no cut")
