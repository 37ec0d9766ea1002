"""Safetensors files, whole or cut short."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import CheckpointError
from shared.checkpoint.integers import Form, checked_table, of_parts, part_names
from shared.checkpoint.joined import is_same
from shared.checkpoint.metadata import parse_metadata, read_metadata

# Of a file's own metadata: a JSON table of the parameters that are integers, and of their form (integers.py).
INTEGERS_KEY = "integers"
_LENGTH = 8  # bytes in front of the header
_MAX_HEADER = 100_000_000  # what the format allows


class SafetensorsCheckpoint:
    """One or more safetensors files."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._shard_of: dict[str, tuple[Path, Any]] = {}
        self._forms: dict[str, Form] = {}
        for path in paths:
            try:
                shard = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {_reason(path, error)}") from error
            names = set(shard.keys())
            for name in names & self._shard_of.keys():
                other, owner = self._shard_of[name]
                if not is_same(owner.get_tensor(name), shard.get_tensor(name)):
                    raise CheckpointError(f"{name} is one thing in {other} and another in {path}")
            self._shard_of |= dict.fromkeys(names, (path, shard))
            if INTEGERS_KEY in (metadata := shard.metadata() or {}):
                table = parse_metadata(metadata[INTEGERS_KEY], f"{path}: its table of integers")
                self._forms |= checked_table(table, names, str(path))
        self._parts = part_names(self._forms)

    def names(self) -> set[str]:
        return set(self._shard_of) - self._parts

    def file_of(self, name: str) -> str:
        return str(self._shard_of[name][0])

    def tensor(self, name: str) -> Tensor:
        integers = self.integers(name)
        return self._stored(name) if integers is None else integers.dequantize()

    def integers(self, name: str) -> Integers | None:
        form = self._forms.get(name)
        if form is None:
            return None
        parts = {part: self._stored(part) for part in {name} | part_names({name: form}) if part in self._shard_of}
        return of_parts(name, parts, form, self.file_of(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        if name in self._forms and dim:
            return self.tensor(name).narrow(dim, start, stop - start)
        if (rows := self.integer_rows(name, start, stop)) is not None:
            return rows.dequantize()
        return self._slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        form = self._forms.get(name)
        if form is None:
            return None
        names = ({name} | part_names({name: form})) & self._shard_of.keys()
        return of_parts(name, {part: self._slice(part)[start:stop] for part in names}, form, self.file_of(name))

    def _stored(self, name: str) -> Tensor:
        return self._shard_of[name][1].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._shard_of[name][1].get_slice(name)


def check_index(index: Path, checkpoint: SafetensorsCheckpoint) -> None:
    """CheckpointError naming a parameter of an index that no shard holds, and the shard that should."""
    weight_map = read_metadata(index).get("weight_map")
    present = checkpoint.names()
    for name, shard in weight_map.items() if isinstance(weight_map, dict) else ():
        if name not in present:
            raise CheckpointError(f"{index.parent / str(shard)} lacks {name}, which {index.name} says it holds")


def _reason(path: Path, error: Exception) -> str:
    """Which tensor a file that is cut short ends in, or the error's own words."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH), "little")
            if header_bytes > min(size - _LENGTH, _MAX_HEADER):
                return f"it ends in its header ({size} bytes)"
            header = parse_metadata(file.read(header_bytes), "its header")
    except (OSError, CheckpointError):
        return str(error)
    ends = {name: end for name, entry in header.items() if (end := _end_of(entry)) is not None}
    cut = [name for name in sorted(ends, key=lambda name: ends[name]) if _LENGTH + header_bytes + ends[name] > size]
    return f"it is cut short, {size} bytes, in {cut[0]}" if cut else str(error)


def _end_of(entry: object) -> int | None:
    """Where a tensor ends, counted from the header's end, as the header says."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[1] if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int) else None
