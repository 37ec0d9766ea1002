"""Several checkpoints as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint, CheckpointError, place_of
from shared.checkpoint.slices import integer_rows_of, part_of, shape_of


class JoinedCheckpoint:
    """All parameters of some checkpoints.

    A parameter may be in several of them, such as a tied embedding, if it is the same there: CheckpointError else.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._owner: dict[str, Checkpoint] = {}
        for checkpoint in checkpoints:
            for name in sorted(checkpoint.names()):
                other = self._owner.setdefault(name, checkpoint)
                if other is not checkpoint and not is_same(other.tensor(name), checkpoint.tensor(name)):
                    raise CheckpointError(
                        f"{name} is one thing{place_of(other, name)} and another{place_of(checkpoint, name)}"
                    )

    def names(self) -> set[str]:
        return set(self._owner)

    def file_of(self, name: str) -> str:
        return place_of(self._owner[name], name).removeprefix(" in ")

    def tensor(self, name: str) -> Tensor:
        return self._owner[name].tensor(name)

    def integers(self, name: str) -> Integers | None:
        return self._owner[name].integers(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._owner[name], name)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return part_of(self._owner[name], name, dim, [range(start, stop)])

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        return integer_rows_of(self._owner[name], name, [range(start, stop)])


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; NaN is the same as itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)
