"""The shards of a tensor-parallel group as a whole model, as another rank's shard, or both at once."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint, CheckpointError, place_of, some_of
from shared.checkpoint.cuts import Cut, CutTable, Sizes, Span
from shared.checkpoint.integers import taken
from shared.checkpoint.joined import is_same

Piece = tuple[int, int, int]  # which shard, its first row or column, and how many


class TensorParallelCheckpoint:
    """What rank `rank` of `ranks` has of a model that lies in `shards`, the first of them rank 0's.

    One rank of one is the whole model; one shard is a whole model to be cut. Only what a rank needs of a tensor is
    copied. Raises CheckpointError naming a parameter that shards lack, or do not agree on, or that cannot be cut.
    """

    def __init__(self, shards: Sequence[Checkpoint], table: CutTable, rank: int = 0, ranks: int = 1) -> None:
        if not shards or not 0 <= rank < ranks:
            raise ValueError(f"rank must be one of {ranks}, got {rank}, with at least one shard, got {len(shards)}")
        self._shards, self._table, self._rank, self._ranks = list(shards), table, rank, ranks
        self._present = [shard.names() for shard in shards]
        self._names = set().union(*self._present)
        # every rank adds the bias of a row-parallel linear once, or rank 0 alone does and has it alone
        for index, names in enumerate(self._present):
            if lacking := sorted(name for name in self._names - names if not self._is_whole(name)):
                raise CheckpointError(
                    f"the shard of rank {index}{_somewhere(shards[index])} lacks {some_of(lacking)}, "
                    f"which others have{place_of(self, lacking[0])}"
                )

    def names(self) -> set[str]:
        return set(self._names)

    def file_of(self, name: str) -> str:
        files = {place_of(shard, name).removeprefix(" in "): None for shard in self._owners(name)}
        return ", ".join(filter(None, files))

    def tensor(self, name: str) -> Tensor:
        parts = [shard.tensor(name) for shard in self._owners(name)]
        cut = self._cut(name, parts)
        if cut is None or cut.dim is None:
            return parts[0]
        dim = cut.dim
        if any(part.dim() <= dim for part in parts):
            raise CheckpointError(f"{name}{place_of(self, name)} has no dimension {dim}: {list(parts[0].shape)}")
        self._check_alike(name, [(part.dtype, part.shape[:dim], part.shape[dim + 1 :]) for part in parts], parts)
        pieces, padding = self._pieces(name, cut, [part.shape[dim] for part in parts])
        found = [parts[shard].narrow(dim, start, count) for shard, start, count in pieces]
        if padding:
            shape = list(parts[0].shape)
            shape[dim] = padding
            found.append(parts[0].new_zeros(shape))
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    def integers(self, name: str) -> Integers | None:
        found = [shard.integers(name) for shard in self._owners(name)]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        cut = self._cut(name, [part.values for part in parts])
        if cut is None or cut.dim is None:
            return parts[0]
        self._check_alike(name, [part.values.shape[1 - cut.dim] for part in parts], [part.values for part in parts])
        pieces, padding = self._pieces(name, cut, [part.values.shape[cut.dim] for part in parts])
        return None if padding else taken(parts, pieces, cut.dim)

    def _owners(self, name: str) -> list[Checkpoint]:
        owners = [shard for shard, names in zip(self._shards, self._present, strict=True) if name in names]
        if not owners:
            raise KeyError(name)
        return owners

    def _is_whole(self, name: str) -> bool:
        cut = self._table.of(name)
        return cut is not None and cut.dim is None

    def _cut(self, name: str, parts: Sequence[Tensor]) -> Cut | None:
        """None for what no rule cuts, but lies alike on every rank. CheckpointError if it does not."""
        cut = self._table.of(name)
        if cut is None and self._ranks > 1:
            raise CheckpointError(f"{name}: no rule says how it is cut for {self._ranks} ranks")
        if cut is None and not all(is_same(part, parts[0]) for part in parts):
            raise CheckpointError(f"{name}: no rule says how it is cut, and it is not the same{place_of(self, name)}")
        if cut is not None and cut.dim is None:
            self._check_alike(name, [(part.dtype, part.shape) for part in parts], parts)
        return cut

    def _check_alike(self, name: str, facts: Sequence[object], parts: Sequence[Tensor]) -> None:
        """CheckpointError naming two shards whose parts do not go together."""
        owners = self._owners(name)
        odd = next((index for index, fact in enumerate(facts) if fact != facts[0]), None)
        if odd is not None:
            one, other = (
                f"{str(parts[index].dtype).removeprefix('torch.')} {list(parts[index].shape)}"
                f"{place_of(owners[index], name)}"
                for index in (0, odd)
            )
            raise CheckpointError(f"{name} is {one}, but {other}")

    def _pieces(self, name: str, cut: Cut, lengths: Sequence[int]) -> tuple[list[Piece], int]:
        """Where this rank's rows or columns lie, in order, and how many rows of padding come after them."""
        sizes, shards = self._table.sizes, len(self._shards)
        try:
            stored = lengths[0] if shards == 1 else _agreed(cut, lengths, sizes)
            held = (
                [cut.spans(stored, rank, shards, sizes) for rank in range(shards)] if shards > 1 else [((0, stored),)]
            )
            length = cut.trimmed(stored, sizes)
            wanted = cut.spans(length, self._rank, self._ranks, sizes) if self._ranks > 1 else ((0, length),)
        except ValueError as error:
            raise CheckpointError(f"{name}{place_of(self, name)}: {error}") from error
        pieces = [piece for start, stop in wanted for piece in _located(held, start, min(stop, length))]
        return pieces, sum(max(0, stop - max(start, length)) for start, stop in wanted)


def _somewhere(shard: Checkpoint) -> str:
    """For errors: the files of a shard."""
    return place_of(shard, *sorted(shard.names()))


def _agreed(cut: Cut, lengths: Sequence[int], sizes: Sizes) -> int:
    """The length of the whole. ValueError if shards disagree on it."""
    wholes = [cut.whole(length, rank, len(lengths), sizes) for rank, length in enumerate(lengths)]
    if len(set(wholes)) > 1:
        raise ValueError(f"its parts of {', '.join(map(str, lengths))} do not make one whole")
    return wholes[0]


def _located(held: Sequence[Sequence[Span]], start: int, stop: int) -> Iterator[Piece]:
    """The pieces of the shards that make up a range of the whole; of what lies on several shards, the first's."""
    while start < stop:
        shard, local, count = next(
            (shard, local + start - first, min(stop, last) - start)
            for shard, spans in enumerate(held)
            for local, (first, last) in zip(_local_starts(spans), spans, strict=True)
            if first <= start < last
        )
        yield shard, local, count
        start += count


def _local_starts(spans: Sequence[Span]) -> list[int]:
    """Where each span begins in its shard."""
    return [0, *accumulate(last - first for first, last in spans)][:-1]
