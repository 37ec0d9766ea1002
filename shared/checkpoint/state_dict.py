"""A state dict as a checkpoint, each of its values checked before anybody reads it."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import CheckpointError, UnsupportedCheckpointError
from shared.checkpoint.integers import Parameter, is_pair, of_pair
from shared.checkpoint.slices import rows_of

_WRAPPINGS = ("module", "model")


class StateDictCheckpoint:
    """A dictionary of tensors, or of DeepSpeed's pairs [int8, scales], by name.

    file: where they come from, for errors. num_bytes: of that file, which no tensor can exceed; None for memory.
    Raises CheckpointError naming the value that is something else.
    """

    def __init__(self, values: object, file: str, num_bytes: int | None = None) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{file} does not hold a dictionary of tensors")
        self._file = file
        self._parameters = {name: _parameter(name, value, file, num_bytes) for name, value in values.items()}

    def names(self) -> set[str]:
        return set(self._parameters)

    def file_of(self, name: str) -> str:
        return self._file

    def tensor(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return parameter.dequantize() if isinstance(parameter, Integers) else parameter

    def integers(self, name: str) -> Integers | None:
        parameter = self._parameters[name]
        return parameter if isinstance(parameter, Integers) else None

    def shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple((parameter.values if isinstance(parameter, Integers) else parameter).shape)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        parameter = self._parameters[name]
        if isinstance(parameter, Integers) and dim == 0:
            return rows_of(parameter, start, stop).dequantize()
        return self.tensor(name).narrow(dim, start, stop - start)

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        integers = self.integers(name)
        return None if integers is None else rows_of(integers, start, stop)


def is_wrapped(loaded: object) -> bool:
    """Whether it is what a training engine saves: the state dict as one entry of several."""
    return isinstance(loaded, Mapping) and any(isinstance(loaded.get(key), Mapping) for key in _WRAPPINGS)


def unwrapped(loaded: object, file: str) -> Mapping[str, object]:
    """The state dict of a training engine's file, which has it as 'module' or as 'model'.

    Raises UnsupportedCheckpointError with DeepSpeed's text if it has both or neither.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file} does not hold a dictionary")
    found = [key for key in _WRAPPINGS if key in loaded]
    if len(found) == 2:
        raise UnsupportedCheckpointError(
            f"{file}: checkpoint has both 'model' and 'module' keys, not sure how to proceed"
        )
    if not found:
        raise UnsupportedCheckpointError(
            f"{file}: checkpoint contains neither 'model' or 'module' keys, not sure how to proceed"
        )
    values = loaded[found[0]]
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file}: {found[0]!r} is no state dict but {type(values).__name__}")
    return cast(Mapping[str, object], values)


def _parameter(name: object, value: object, file: str, num_bytes: int | None) -> Parameter:
    if not isinstance(name, str) or not (isinstance(value, Tensor) or is_pair(value)):
        raise CheckpointError(f"{file} does not hold a dictionary of tensors: {name!r} is {type(value).__name__}")
    if isinstance(value, Tensor):
        return _checked(name, value, file, num_bytes)
    tensor, scale = (_checked(name, part, file, num_bytes) for part in value)
    try:
        return of_pair(tensor, scale)
    except ValueError as error:
        raise CheckpointError(f"{name} in {file}: {error}") from error


def _checked(name: str, tensor: Tensor, file: str, num_bytes: int | None) -> Tensor:
    """The tensor without its gradient. A few bytes may claim to be any shape, by strides of 0."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{name} in {file} is no plain tensor but {tensor.layout} on {tensor.device}")
    if num_bytes is not None and tensor.numel() * tensor.element_size() > num_bytes:
        raise CheckpointError(f"{name} claims to be {list(tensor.shape)}, more than its file {file} holds")
    return tensor.detach()
