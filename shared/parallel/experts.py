"""Which experts of a model a rank has, and which outputs of theirs, as plain arithmetic. Free of torch.

    rank     0  1  2  3      of 4, with ep_size 2
    experts  a  b  a  b      a, b: the halves of each layer's; ep groups are 0 1 and 2 3
    outputs  x  x  y  y      x, y: the halves of each linear's; mp groups are 0 2 and 1 3

Activations are whole on every rank, so that tokens need not travel to their experts: each rank computes the pairs of
its own, and what they answered is put together.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.models.architecture import Architecture
from shared.parallel.partition import Slice
from shared.parallel.sharding import Shard


@dataclass(frozen=True)
class ExpertShard:
    """ep: by which the experts of a layer are cut; mp: by which the outputs of each of their linears are."""

    ep: Shard
    mp: Shard

    @classmethod
    def of(cls, rank: int, size: int, ep_size: int) -> ExpertShard:
        """Of one of the ranks that have a model together. ValueError unless ep_size divides them."""
        if ep_size < 1 or size % ep_size:
            raise ValueError(f"Invalid ep_size={ep_size} for world_size={size}: use a divisor")
        return cls(Shard(rank % ep_size, ep_size), Shard(rank // ep_size, size // ep_size))


def expert_shard_of(architecture: Architecture, shard: Shard | None) -> ExpertShard | None:
    """How ranks that share a model share its experts where nothing else is said: each has some outputs of all."""
    return ExpertShard(Shard(0, 1), shard) if shard is not None and architecture.experts else None


class ExpertPartition:
    """The experts of a model, as a rank sees them. ValueError naming what cannot be cut."""

    def __init__(self, architecture: Architecture, shard: ExpertShard) -> None:
        experts = architecture.experts
        if experts is None:
            raise ValueError("the model has no experts that ranks could share")
        self.shard, self._is_gated, self._width = shard, architecture.gated, experts.intermediate_size
        self._counts = experts.counts
        for layer, count in enumerate(experts.counts):
            if count % shard.ep.size:
                raise ValueError(
                    f"Invalid ep_size={shard.ep.size} for the {count} experts of layer {layer}: use a divisor of them"
                )
        # what an expert's linears give, in features, by the ranks that share it
        self.mlp = shard.mp.shares(experts.intermediate_size, "features of an expert")
        self.hidden = shard.mp.shares(architecture.hidden_size, "hidden features")

    def numbers(self, layer: int) -> range:
        """Of this rank's experts of a layer."""
        count = self._counts[layer] // self.shard.ep.size
        return range(self.shard.ep.rank * count, (self.shard.ep.rank + 1) * count)

    def slice_of(self, module: str) -> Slice:
        """This rank's outputs of a linear of each expert, which is experts_up or experts_down."""
        rank = self.shard.mp.rank
        if module == "experts_down":
            return Slice(0, (self.hidden[rank],))
        own = self.mlp[rank]
        return Slice(0, (own, range(self._width + own.start, self._width + own.stop)) if self._is_gated else (own,))

    def shape(self, module: str, layer: int, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of this rank's part of a parameter [experts, outputs, ...] of a layer."""
        return (len(self.numbers(layer)), *self.slice_of(module).shape(whole[1:]))
