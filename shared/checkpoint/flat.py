"""All tensors of a model in one buffer, each at an aligned place, with a table of them: read again by mapping it.

flat.json   {"format": "tandem-flat", "num_bytes": ..., "tensors": [{"name", "dtype", "shape", "offset"}, ...],
             "integers": {name: form}}
flat.bin    the bytes, offsets counted from its beginning
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import CheckpointError
from shared.checkpoint.integers import Parameter, as_parts, checked_table, of_parts, part_names
from shared.checkpoint.metadata import read_metadata

TABLE_NAME, BUFFER_NAME = "flat.json", "flat.bin"
FORMAT = "tandem-flat"
# Of a device's loads, and of every dtype.
ALIGNMENT = 256
_MAX_DIMENSIONS = 16
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class _Entry:
    """A tensor's place in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def save_flat(folder: Path, parameters: Mapping[str, Parameter]) -> None:
    """Writes both files, the table last. Raises CheckpointError naming a tensor whose dtype has no name here."""
    tensors, forms = as_parts(parameters)
    folder.mkdir(parents=True, exist_ok=True)
    table, buffer = folder / TABLE_NAME, folder / BUFFER_NAME
    table.unlink(missing_ok=True)
    entries, offset = [], 0
    unfinished = buffer.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            for name, tensor in tensors.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                if dtype not in _DTYPES:
                    raise CheckpointError(f"{name} is {dtype}; {', '.join(_DTYPES)} are written")
                file.write(bytes(offset - file.tell()))
                entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "offset": offset})
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            num_bytes = file.tell()
        unfinished.replace(buffer)
    finally:
        unfinished.unlink(missing_ok=True)
    table.write_text(json.dumps({"format": FORMAT, "num_bytes": num_bytes, "tensors": entries, "integers": forms}))


class FlatCheckpoint:
    """The two files of a folder.

    Raises CheckpointError naming the tensor that the buffer ends before, or that lies over another, and whatever else
    the table says that cannot be.
    """

    def __init__(self, folder: Path) -> None:
        table, self._file = folder / TABLE_NAME, folder / BUFFER_NAME
        data = read_metadata(table)
        if data.get("format") != FORMAT:
            raise CheckpointError(f"{table} is no table of a flat checkpoint: format {data.get('format')!r}")
        try:
            size = self._file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"cannot read {self._file}: {error.strerror}") from error
        entries = data.get("tensors")
        if not isinstance(entries, list):
            raise CheckpointError(f"{table} has no list of tensors")
        self._entries = _checked([_entry(entry, table) for entry in entries], table, self._file, size)
        if data.get("num_bytes") != size:
            raise CheckpointError(f"{self._file} has {size} bytes, but {table} says {data.get('num_bytes')!r}")
        self._forms = checked_table(data.get("integers", {}), set(self._entries), str(table))
        self._parts = part_names(self._forms)
        self._buffer = _mapped(self._file, size)

    def names(self) -> set[str]:
        return set(self._entries) - self._parts

    def file_of(self, name: str) -> str:
        return str(self._file)

    def tensor(self, name: str) -> Tensor:
        integers = self.integers(name)
        return self._stored(name) if integers is None else integers.dequantize()

    def integers(self, name: str) -> Integers | None:
        form = self._forms.get(name)
        if form is None:
            return None
        parts = {part: self._stored(part) for part in {name} | part_names({name: form}) if part in self._entries}
        return of_parts(name, parts, form, str(self._file))

    def _stored(self, name: str) -> Tensor:
        """Over the mapped memory."""
        entry = self._entries[name]
        return self._buffer[entry.offset : entry.end].view(entry.dtype).reshape(entry.shape)


def _mapped(path: Path, size: int) -> Tensor:
    """The file's bytes; what is written to them stays in this process."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _entry(entry: object, table: Path) -> _Entry:
    """An entry whose numbers are possible, wherever it lies."""
    if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
        raise CheckpointError(f"{table}: {str(entry)[:60]!r} is no tensor")
    dtype, shape, offset = entry.get("dtype"), entry.get("shape"), entry.get("offset")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{table}: {name} has dtype {dtype!r}; {', '.join(_DTYPES)} are read")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_size(size) for size in shape):
        raise CheckpointError(f"{table}: {name} has shape {str(shape)[:60]}")
    # of a tensor without elements, too: torch multiplies the others
    if prod(size or 1 for size in shape) > _LARGEST:
        raise CheckpointError(f"{table}: {name} has shape {shape}, more than any file holds")
    if not _is_size(offset) or offset % ALIGNMENT:
        raise CheckpointError(f"{table}: {name} has offset {offset!r}, which must be a multiple of {ALIGNMENT}")
    return _Entry(name, _DTYPES[dtype], tuple(shape), offset)


_LARGEST = (1 << 63) - 1


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _checked(entries: list[_Entry], table: Path, buffer: Path, size: int) -> dict[str, _Entry]:
    ordered = sorted(entries, key=lambda entry: (entry.offset, entry.end))
    for entry in ordered:
        if entry.end > size:
            raise CheckpointError(
                f"{entry.name} lies beyond the end of {buffer}: at {entry.offset}, {entry.num_bytes} bytes of {size}"
            )
    for one, other in pairwise(entry for entry in ordered if entry.num_bytes):
        if other.offset < one.end:
            raise CheckpointError(f"{table}: {one.name} and {other.name} lie over each other")
    found = {entry.name: entry for entry in entries}
    if len(found) < len(entries):
        names = sorted(entry.name for entry in entries)
        twice = next(one for one, other in pairwise(names) if one == other)
        raise CheckpointError(f"{table}: {twice} is there twice")
    return found
