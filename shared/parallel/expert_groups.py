"""The ranks that exchange what experts answered: those that have other experts, and those that share this one's."""

from __future__ import annotations

from dataclasses import dataclass

from shared.parallel.experts import ExpertShard
from shared.parallel.group import Group
from shared.parallel.sharding import Shard


@dataclass(frozen=True)
class ExpertGroups:
    """ep: the ranks among which the experts of a layer are divided. mp: those that have the same experts, and each some
    outputs of theirs. None: this rank alone. world: all of them, where that is known."""

    ep: Group | None
    mp: Group | None
    world: Group | None = None

    @classmethod
    def of(cls, world: Group, ep_size: int) -> ExpertGroups:
        """Of the ranks that have a model together. Every one of them calls this. ValueError unless ep_size divides
        them."""
        shard = ExpertShard.of(world.rank, world.size, ep_size)
        if ep_size == 1:
            return cls(None, world, world)
        if ep_size == world.size:
            return cls(world, None, world)
        first = world.rank - shard.ep.rank
        ep = world.part(range(first, first + ep_size))
        return cls(ep, world.part(range(shard.ep.rank, world.size, ep_size)), world)

    @property
    def shard(self) -> ExpertShard:
        return ExpertShard(_shard_of(self.ep), _shard_of(self.mp))


def _shard_of(group: Group | None) -> Shard:
    return Shard(0, 1) if group is None else Shard(group.rank, group.size)
