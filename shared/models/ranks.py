"""The ranks that compute a model together, as its layers use them: each has some columns of what a linear gives.

Linears are cut by their outputs, so an output is summed by one rank, in the order in which one process would sum it,
and the columns are gathered: what is whole has the same bits with any number of ranks. Of each layer the attended
values cross, what the output projection made of them, the MLP's activations, and what the last projection made of
those. Where a last linear is cut by its inputs the partial sums cross instead, and bits are those of that many ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.cpu.library import is_recording
from kernels.linear import LinearWeight
from shared.models.architecture import Architecture
from shared.parallel.group import Group
from shared.parallel.partition import Partition

Columns = Literal["queries", "qkv", "hidden", "mlp", "shared_mlp", "tokens"]


class Ranks:
    """A group, and how a model is cut for it."""

    def __init__(self, group: Group, partition: Partition) -> None:
        """ValueError for a partition that is another rank's."""
        shard = partition.shard
        if (group.rank, group.size) != (shard.rank, shard.size):
            raise ValueError(
                f"the shard is rank {shard.rank} of {shard.size}, and this process is rank {group.rank} of {group.size}"
            )
        self.group, self.partition = group, partition
        self.rank = group.rank
        head_dim = partition.whole.head_dim
        self._widths: dict[Columns, list[int]] = {
            "queries": [len(part) for part in partition.queries],
            "qkv": [(len(heads.queries) + 2 * len(heads.kv_heads)) * head_dim for heads in partition.heads],
            "hidden": [len(part) for part in partition.hidden],
            "mlp": [len(part) for part in partition.mlp],
            "shared_mlp": [len(part) for part in partition.shared_mlp],
            "tokens": [len(part) for part in partition.tokens],
        }

    @property
    def own(self) -> Architecture:
        """Of this rank."""
        return self.partition.own

    def splits_inputs(self, module: str, weight: LinearWeight) -> bool:
        """Whether a linear reads this rank's columns alone, and gives partial sums."""
        return self.partition.splits_inputs(module, is_plain=weight.quantization is None)

    def width(self, columns: Columns) -> int:
        """Of all ranks."""
        return sum(self._widths[columns])

    def gather(self, x: Tensor, columns: Columns, out: Tensor) -> Tensor:
        """This rank's columns [rows, own] -> out [rows, of all ranks]."""
        return out if is_recording() else self.group.gather(x, self._widths[columns], out)

    def add(self, partial: Tensor, out: Tensor) -> Tensor:
        """The ranks' partial sums, float32, rounded once -> out."""
        return out if is_recording() else self.group.add(partial, out)

    def add_disjoint(self, x: Tensor) -> Tensor:
        """In place, of x that is zeros on all ranks but one."""
        return x if is_recording() else self.group.add_disjoint(x)

    def whole_projections(self, device: torch.device) -> Tensor:
        """Where queries and keys, each once and in order, lie in the gathered columns "qkv": int64 [width]."""
        d, starts, total = self.partition.whole.head_dim, [], 0
        for width in self._widths["qkv"]:
            starts.append(total)
            total += width
        places = [
            range(start, start + len(heads.queries) * d)
            for start, heads in zip(starts, self.partition.heads, strict=True)
        ]
        seen = 0
        for start, heads in zip(starts, self.partition.heads, strict=True):
            for index, head in enumerate(heads.kv_heads):
                if head == seen:  # on several ranks where there are few
                    first = start + (len(heads.queries) + index) * d
                    places.append(range(first, first + d))
                    seen += 1
        return torch.tensor([place for one in places for place in one], device=device)
