"""Weights and biases of one linear layer of every expert, packed side by side for the ops of kernels/moe.py.

Each expert's is packed as kernels/linear.py packs one, quantized if asked, and on a CPU multiplied to the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kernels.linear import LinearWeight
from kernels.quantization import Integers, Quantization


class ExpertWeights:
    """Weights [experts, out, in], packed one by one as they come: those of a generator are never all in memory.

    weights: of each expert, in order, [out, in]; the copy replaces the originals, which may be freed.
    bias: [experts, out] of their dtype, or None.
    Raises ValueError for another number of them, for weights that differ in shape or dtype, and what LinearWeight does.
    """

    FIELDS = ("packed", "scale", "offset", "bias", "how")  # of `tensors`

    def __init__(
        self,
        weights: Iterable[Tensor],
        num_experts: int,
        quantization: Quantization | None = None,
        *,
        bias: Tensor | None = None,
    ) -> None:
        biases = _each(bias, num_experts)
        self._pack((LinearWeight(weight, next(biases), quantization) for weight in weights), num_experts)

    @classmethod
    def of_integers(
        cls, integers: Iterable[Integers], num_experts: int, dtype: torch.dtype, *, bias: Tensor | None = None
    ) -> ExpertWeights:
        """Weights that come quantized, all alike. dtype: of x, and of bias."""
        weights, biases = cls.__new__(cls), _each(bias, num_experts)
        weights._pack((LinearWeight.of_integers(one, next(biases), dtype) for one in integers), num_experts)
        return weights

    def _pack(self, linears: Iterator[LinearWeight], num_experts: int) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        tensors: dict[str, Tensor] = {}
        kinds: set[tuple[str, torch.dtype, int, int]] = set()
        for expert in range(num_experts):
            linear = next(linears, None)
            if linear is None:
                raise ValueError(f"there must be weights of {num_experts} experts, got {expert}")
            kinds.add((linear.description, linear.dtype, linear.out_features, linear.in_features))
            if len(kinds) > 1:
                raise ValueError(f"the weights of experts must be alike, up to expert {expert} they are {kinds}")
            parts = linear.tensors()
            if not tensors:
                tensors = {field: part.new_empty(num_experts, *part.shape) for field, part in parts.items()}
            for field, of_all in tensors.items():
                of_all[expert] = parts[field]
        if next(linears, None) is not None:
            raise ValueError(f"there must be weights of {num_experts} experts, got more")
        _, dtype, out_features, in_features = kinds.pop()
        self._take(tensors, (num_experts, out_features, in_features), dtype)

    def _take(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        self.num_experts, self.out_features, self.in_features = shape
        self.dtype, self._tensors = dtype, dict(tensors)
        self.first = self.expert(0)  # where the memory of all begins

    @property
    def packed(self) -> Tensor:
        """[experts, ...], each as a LinearWeight has its own."""
        return self._tensors["packed"]

    @property
    def bias(self) -> Tensor | None:
        """[experts, out]."""
        return self._tensors.get("bias")

    @property
    def quantization(self) -> Quantization | None:
        return self.first.quantization

    @property
    def description(self) -> str:
        """How it is packed, for logs and errors."""
        return f"{self.num_experts} experts of {self.first.description}"

    @property
    def num_bytes(self) -> int:
        """Of all experts: a row reads what its own have of it."""
        return self.num_experts * self.first.num_bytes

    def expert(self, index: int) -> LinearWeight:
        """One expert's weight, over the same memory."""
        parts = {field: tensor[index] for field, tensor in self._tensors.items()}
        return LinearWeight.from_tensors(parts, (self.out_features, self.in_features), self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, to be stored."""
        return dict(self._tensors)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> ExpertWeights:
        """The weights that `tensors` came from, over the same memory. Raises KeyError if they came from none.

        shape: [experts, out, in]; dtype: as they had it.
        """
        weights = cls.__new__(cls)
        weights._take(tensors, shape, dtype)
        return weights


def _each(bias: Tensor | None, num_experts: int) -> Iterator[Tensor | None]:
    """Of each expert, and None for those that there should not be."""
    if bias is not None and (bias.dim() != 2 or len(bias) != num_experts):
        raise ValueError(f"bias must be of {num_experts} experts, [experts, out], got {list(bias.shape)}")
    return itertools.chain(() if bias is None else bias, itertools.repeat(None))
