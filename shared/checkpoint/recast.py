"""A checkpoint's parameters as an engine keeps them: in another dtype, some of them as integers."""

from collections.abc import Collection

import torch
from torch import Tensor

from kernels.quantization import Integers, Quantization, quantize
from shared.checkpoint.contract import Checkpoint, place_of

_INT8 = Quantization(8)


class RecastCheckpoint:
    """The same names. Floats are of `dtype`, those of `quantized` int8 with a scale for each row [out, in]."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, quantized: Collection[str] = ()) -> None:
        self._checkpoint, self._dtype, self._quantized = checkpoint, dtype, frozenset(quantized)

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def file_of(self, name: str) -> str:
        return place_of(self._checkpoint, name).removeprefix(" in ")

    def tensor(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(name)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def integers(self, name: str) -> Integers | None:
        if name not in self._quantized:
            return None
        stored = self._checkpoint.integers(name)
        if stored is not None and stored.quantization == _INT8:
            return stored
        values, scale, offset = quantize(self.tensor(name), _INT8)
        return Integers(8, values, scale, offset)
