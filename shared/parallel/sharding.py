"""What each of several ranks has of a model, as plain arithmetic. Free of torch.

A linear is cut by its outputs, in grains; attention in whole heads. Query heads lie on the ranks in order, in shares
side by side, and each rank has the key-value heads that its queries read:

    key-value heads >= ranks   they are cut as evenly as can be, the first ranks having one more, each with its queries
    key-value heads < ranks    each lies on ranks / key-value heads of them, which share out its queries as evenly as
                               can be; ranks are a multiple of the key-value heads

So the queries of a rank read its key-value heads in equal groups. More is cut than by DeepSpeed's rules: it asks that
key-value heads which are fewer than queries be a multiple of the ranks, or divide them together with the queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from shared.models.architecture import Architecture

# Outputs that stay together: a panel of kernels/cpu/panels.py, half a tile of kernels/cuda/linear.py.
GRAIN = 32


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`; ValueError for a rank that is none.

    grain: features that stay together where a linear is cut. splits_inputs: a sub-layer's last linear, where it is not
    quantized, is cut by its inputs, and the ranks' sums are added; otherwise each output is summed by one rank, in the
    order in which one process sums it.
    """

    rank: int
    size: int
    grain: int = GRAIN
    splits_inputs: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be one of {self.size}, got {self.rank}")
        if self.grain < 1:
            raise ValueError(f"grain must be at least 1, got {self.grain}")

    def shares(self, total: int, what: str = "features") -> list[range]:
        """Of each rank: `total` cut in grains, halved as often as it takes for each to have one. ValueError if there
        are fewer features than ranks."""
        if total < self.size:
            raise ValueError(f"{total} {what} cannot be cut for {self.size} ranks: use {total} or fewer")
        grain = self.grain
        while grain > 1 and grain * self.size > total:
            grain //= 2
        return cut(total, self.size, grain)

    def share(self, total: int, what: str = "features") -> range:
        """This rank's."""
        return self.shares(total, what)[self.rank]


def cut(total: int, parts: int, grain: int = 1) -> list[range]:
    """range(total) in contiguous parts of whole grains, as even as they allow, the first parts having one more; the
    last grain may be cut short. Parts are empty where there are fewer grains."""
    grains = -(-total // grain)
    share, more = divmod(grains, parts)
    starts = [min((part * share + min(part, more)) * grain, total) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class HeadShare:
    """The heads of a rank, by their numbers in the whole model."""

    queries: range
    kv_heads: range


def head_shares(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """Of each rank. ValueError naming what does not fit."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads")
    if num_heads < ranks:
        raise ValueError(
            f"{num_heads} query heads cannot be cut for {ranks} ranks, each needs one: use {num_heads} or fewer"
        )
    group = num_heads // num_kv_heads
    if num_kv_heads >= ranks:
        return [HeadShare(range(heads.start * group, heads.stop * group), heads) for heads in cut(num_kv_heads, ranks)]
    copies = ranks // num_kv_heads
    if ranks % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} key-value heads cannot be cut for {ranks} ranks, nor copied on as many each: use "
            f"{num_kv_heads} ranks, fewer, or a multiple"
        )
    return [
        HeadShare(range(head * group + queries.start, head * group + queries.stop), range(head, head + 1))
        for head in range(num_kv_heads)
        for queries in cut(group, copies)
    ]


def rank_architecture(a: Architecture, shard: Shard) -> Architecture:
    """The record of what a rank computes by itself: its own heads, and its own features between the MLP's linears.

    What goes from layer to layer is whole on all ranks, and so are the sizes of it. ValueError as from head_shares.
    """
    heads = head_shares(a.num_heads, a.num_kv_heads, shard.size)[shard.rank]
    return replace(
        a,
        num_heads=len(heads.queries),
        num_kv_heads=len(heads.kv_heads),
        intermediate_size=len(shard.share(a.intermediate_size, "features of the MLP")),
        alibi_slopes=a.alibi_slopes[heads.queries.start : heads.queries.stop],
    )
