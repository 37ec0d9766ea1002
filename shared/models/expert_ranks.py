"""The ranks that have a model's experts together, as its layers use them.

Each computes the pairs of its own experts, for tokens that it has whole, and zeros stand for the others' pairs. So what
all answered is put together by adding, of which each element has one rank alone: the bits are those of one process.
"""

from __future__ import annotations

from torch import Tensor

from kernels.cpu.library import is_recording
from shared.parallel.expert_groups import ExpertGroups
from shared.parallel.experts import ExpertPartition


class ExpertRanks:
    """The groups of this rank, and how experts are cut for them."""

    def __init__(self, groups: ExpertGroups, partition: ExpertPartition) -> None:
        """ValueError for a partition that is another rank's."""
        own, meant = groups.shard, partition.shard
        if any((a.rank, a.size) != (b.rank, b.size) for a, b in ((own.ep, meant.ep), (own.mp, meant.mp))):
            raise ValueError(f"the experts are those of {meant}, and this process is {own}")
        self._groups, self._partition = groups, partition
        self._widths = {"mlp": [*map(len, partition.mlp)], "hidden": [*map(len, partition.hidden)]}

    def first(self, layer: int) -> int:
        """The number of this rank's first expert."""
        return self._partition.numbers(layer).start

    def width(self, columns: str) -> int:
        """Of all ranks that share an expert."""
        return sum(self._widths[columns])

    @property
    def shares_outputs(self) -> bool:
        """Whether another rank has some outputs of this one's experts."""
        return self._groups.mp is not None

    def gather(self, x: Tensor, columns: str, out: Tensor) -> Tensor:
        """This rank's outputs [pairs, own] of its experts -> out, with all of them. columns: mlp or hidden."""
        return (
            out if is_recording() or self._groups.mp is None else self._groups.mp.gather(x, self._widths[columns], out)
        )

    def add_disjoint(self, y: Tensor) -> Tensor:
        """In place: the pairs of all experts, of y that is zeros where they are others'."""
        return y if is_recording() or self._groups.ep is None else self._groups.ep.add_disjoint(y)
