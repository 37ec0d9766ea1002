"""Layers as DeepSpeed's kernel injection saves them, with their linears [out, in] as everywhere else.

Floats are [in, out] in its files, integers [out, in].
"""

import re

from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint, place_of

_LINEAR = re.compile(r"(?:^|\.)(attn_qkvw|attn_[qkvo]w|inter(_up|_gate)?_w|output_w)$")


class InjectedCheckpoint:
    """`names` are DeepSpeed's: attn_qkvw, attn_ow, inter_w, output_w, … after the layer's own."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def file_of(self, name: str) -> str:
        return place_of(self._checkpoint, name).removeprefix(" in ")

    def tensor(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(name)
        is_turned = _LINEAR.search(name) and tensor.dim() == 2 and self.integers(name) is None
        return tensor.T if is_turned else tensor

    def integers(self, name: str) -> Integers | None:
        return self._checkpoint.integers(name)


def is_injected(names: set[str]) -> bool:
    """Whether a state dict's names are those of replaced layers."""
    return any(name.endswith("attn_qkvw") for name in names)
