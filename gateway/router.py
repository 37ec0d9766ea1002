"""Which worker takes a request: the least loaded, unless another holds the prompt's prefix and is not clearly busier.

Pure: what it knows of the workers is what it is given.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# A prefix longer than this tells no more about where it is cached.
MAX_PREFIX_BLOCKS = 64


@dataclass(frozen=True)
class Candidate:
    """A worker that could take the request.

    load: work ahead of a new request, in whatever unit the caller compares (tokens, requests).
    """

    worker_id: str
    load: float


def prefix_hashes(token_ids: Sequence[int], block_tokens: int, cache_salt: str) -> list[bytes]:
    """A hash for each leading full block of a prompt, each over all blocks before it."""
    hashes: list[bytes] = []
    parent = hashlib.blake2b(cache_salt.encode(), digest_size=16).digest()
    # the last token is always computed anew, so a block that ends with it is never found in a cache
    for start in range(0, min((len(token_ids) - 1) // block_tokens, MAX_PREFIX_BLOCKS) * block_tokens, block_tokens):
        block = array("I", token_ids[start : start + block_tokens]).tobytes()
        parent = hashlib.blake2b(parent + block, digest_size=16).digest()
        hashes.append(parent)
    return hashes


class Router:
    """Chooses among workers of one role, and remembers where prefixes went.

    max_prefixes: hashes remembered; the least recently used is forgotten.
    """

    def __init__(self, max_prefixes: int = 65_536) -> None:
        self._max_prefixes = max_prefixes
        self._holders: OrderedDict[bytes, str] = OrderedDict()
        self._chosen: dict[str, int] = {}  # worker → turn of its last choice, to go round among equals
        self._turn = 0

    def choose(
        self,
        candidates: Sequence[Candidate],
        prefix: Sequence[bytes] = (),
        *,
        excluded: Collection[str] = (),
        slack_per_block: float = 0.0,
        slack: float = 0.0,
    ) -> str | None:
        """The id of a worker, None if there is none that is not excluded.

        prefix: of the prompt, from prefix_hashes. The worker that holds its longest part is taken unless its load
        exceeds the least by more than `slack + slack_per_block * blocks held`.
        """
        usable = [candidate for candidate in candidates if candidate.worker_id not in excluded]
        if not usable:
            return None
        best = min(usable, key=lambda candidate: (candidate.load, self._chosen.get(candidate.worker_id, 0)))
        by_id = {candidate.worker_id: candidate for candidate in usable}
        for num_blocks in range(len(prefix), 0, -1):
            holder = by_id.get(self._holders.get(prefix[num_blocks - 1], ""))
            if holder is not None:
                if holder.load <= best.load + slack + slack_per_block * num_blocks:
                    best = holder
                break
        self._turn += 1
        self._chosen[best.worker_id] = self._turn
        self._remember(prefix, best.worker_id)
        return best.worker_id

    def forget(self, worker_id: str) -> None:
        """A worker is gone, and its cache with it."""
        self._chosen.pop(worker_id, None)
        for key in [key for key, holder in self._holders.items() if holder == worker_id]:
            del self._holders[key]

    def _remember(self, prefix: Sequence[bytes], worker_id: str) -> None:
        for key in prefix:
            self._holders[key] = worker_id
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_prefixes:
            self._holders.popitem(last=False)
