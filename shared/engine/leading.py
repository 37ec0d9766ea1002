"""The engine of a worker's leading rank: what it computes, the worker's other ranks compute with it.

Each rank has a pool of its own heads. All of them belong to this worker: a rank writes what a forward computes, into
the blocks that its entries name. The leading rank alone copies blocks, out of every pool and into it: within a pool and
to host memory between two forwards, the other ranks having answered before a forward returns, and from other workers
into blocks that no forward names yet. So no two ever write one block, and what is freed here is free on all ranks.

On CUDA a process does not see what another has told their device. So a rank answers once its device has computed the
forward, and the leading rank begins one once the others' devices have done what it had told them. A mark is one number
for all pools (shared/transport/pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shared.batch import BatchEntry
from shared.engine.engine import Engine
from shared.engine.plan import EnginePlan
from shared.kv_cache import KvCache
from shared.models.weights import ModelWeights
from shared.parallel.entries import encode_entries
from shared.parallel.followers import Followers
from shared.parallel.group import Group, GroupError
from shared.parallel.link import Kind
from shared.parallel.start import TIMEOUT_S
from shared.penalties import SampleRow
from shared.transport.pool import Pool, mark, settle


class LeadingEngine(Engine):
    """An engine whose forwards are of all ranks. A forward that fails on any of them raises GroupError: the others may
    wait for it, and no other forward can follow."""

    def __init__(
        self, plan: EnginePlan, pools: Sequence[Pool], followers: Followers, *, weights: ModelWeights, group: Group
    ) -> None:
        """pools: of all ranks in their order. The followers have been told to JOIN."""
        own, *others = (pool.device or pool.memory for pool in pools)
        super().__init__(plan, own, weights=weights, group=group)
        self._pools, self._followers = tuple(pools), followers
        self._others = [
            KvCache(pool.layout, pool.num_blocks, memory=memory.tensor)
            for pool, memory in zip(pools[1:], others, strict=True)
        ]
        self._expect()

    @property
    def caches(self) -> tuple[KvCache, ...]:
        return self.kv, *self._others

    @property
    def description(self) -> str:
        return f"{super().description}, {len(self.caches)} ranks"

    def warm_up(self) -> None:
        self._tell(Kind.WARM_UP)
        super().warm_up()
        self._expect()

    def forward(self, entries: Sequence[BatchEntry]) -> Tensor:
        self._tell(Kind.FORWARD, encode_entries(entries))
        try:
            logits = super().forward(entries)
        except GroupError:
            raise
        except Exception as error:
            raise GroupError(f"rank 0: {type(error).__name__}: {error}") from error
        self._expect()
        return logits

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        return [None] * len(rows), self.forward(entries)

    def mark(self) -> int:
        return mark(self._pools)

    def close(self) -> None:
        for cache in self._others:
            cache.close()
        super().close()

    def _tell(self, kind: Kind, body: bytes = b"") -> None:
        settle(self._pools[1:], self.mark())
        self._followers.tell(kind, body)

    def _expect(self) -> None:
        self._followers.expect(TIMEOUT_S)
