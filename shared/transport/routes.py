"""Which pool a pool's heads come from, where both sides may have several with any slices of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.kv_cache import KvLayout


@dataclass(frozen=True, slots=True)
class Route:
    """num_heads heads of the source with number `source`, from its head source_head on, are those of the target from
    target_head on."""

    source: int
    target: int
    source_head: int
    target_head: int
    num_heads: int


def routes(sources: Sequence[KvLayout], targets: Sequence[KvLayout]) -> list[Route]:
    """Every head of every target, once, and in as few runs of heads as can be; of a source's first, then of the next.

    A head that several sources have comes from the one whose layout is the target's own, if there is one, for its
    blocks are copied whole, else from the first. Raises ValueError for a head that no source has.
    """
    found: list[Route] = []
    for number, target in enumerate(targets):
        order = sorted(range(len(sources)), key=lambda i: sources[i] != target)
        head = target.first_kv_head
        while head < target.end_kv_head:
            source = next((i for i in order if sources[i].first_kv_head <= head < sources[i].end_kv_head), None)
            if source is None:
                raise ValueError(f"head {head} is in none of the pools")
            end = min(target.end_kv_head, sources[source].end_kv_head)
            found.append(
                Route(source, number, head - sources[source].first_kv_head, head - target.first_kv_head, end - head)
            )
            head = end
    return sorted(found, key=lambda route: (route.source, route.target))
