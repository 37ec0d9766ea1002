"""A checkpoint's parameters as an engine keeps them: in another dtype, some of them quantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.quantization import Integers, Quantization, quantize
from shared.checkpoint.contract import Checkpoint, place_of
from shared.checkpoint.integers import serves


class RecastCheckpoint:
    """The same names. Floats are of `dtype`; `quantized`: how others are kept, each [out, in]."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, quantized: Mapping[str, Quantization] | None = None
    ) -> None:
        self._checkpoint, self._dtype, self._quantized = checkpoint, dtype, dict(quantized or {})

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def file_of(self, name: str) -> str:
        return place_of(self._checkpoint, name).removeprefix(" in ")

    def tensor(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(name)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def integers(self, name: str) -> Integers | None:
        how = self._quantized.get(name)
        if how is None:
            return None
        stored = self._checkpoint.integers(name)
        if stored is not None and serves(stored, how):
            return stored
        return Integers(how.bits, *quantize(self.tensor(name), how), how.floating)
