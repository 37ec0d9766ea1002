"""Which part of each parameter of a model a rank has. Free of torch.

by outputs     qkv in heads, up (gate and up each by itself), output and down in features, embedding and lm_head in
               tokens; biases, and norms with weights of each head, with them
by inputs      output and down, where the shard says so and they are not quantized: their bias is rank 0's
experts        some of them, or some outputs of each: experts.py
whole          all else: norms, positions, what decides where tokens go
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.models.architecture import Architecture
from shared.parallel.sharding import HeadShare, Shard, head_shares, rank_architecture

_TABLES = ("embedding", "lm_head")
_LAST = ("output", "down", "shared_down")  # of a sub-layer


@dataclass(frozen=True)
class Slice:
    """Ranges of a parameter's outputs (dim 0) or inputs (dim 1), in order."""

    dim: Literal[0, 1]
    ranges: tuple[range, ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of the slice."""
        return (*whole[: self.dim], sum(map(len, self.ranges)), *whole[self.dim + 1 :])


class Partition:
    """A model on the ranks of a shard's size, as that rank sees it. ValueError naming what cannot be cut."""

    def __init__(self, architecture: Architecture, shard: Shard) -> None:
        self.whole, self.shard = architecture, shard
        self.own = rank_architecture(architecture, shard)
        self.heads = head_shares(architecture.num_heads, architecture.num_kv_heads, shard.size)
        # what a linear gives, in features, by ranks
        self.hidden = shard.shares(architecture.hidden_size, "hidden features")
        self.mlp = shard.shares(architecture.intermediate_size, "features of the MLP")
        shared = architecture.experts.shared_size if architecture.experts else 0
        self.shared_mlp = shard.shares(shared, "features of the shared expert") if shared else []
        # of an image's class token there is one
        vocabulary = 0 if architecture.patches else architecture.vocab_size
        self.tokens = shard.shares(vocabulary, "tokens of the vocabulary") if vocabulary else []

    @property
    def queries(self) -> list[range]:
        """Columns of attended values, by ranks."""
        return [self._rows(heads.queries) for heads in self.heads]

    def splits_inputs(self, module: str, *, is_plain: bool) -> bool:
        """Whether a linear is cut by its inputs. is_plain: it is not quantized."""
        return module in _LAST and is_plain and self.shard.splits_inputs

    def slice_of(self, ours: str, *, is_plain: bool) -> Slice | None:
        """This rank's part of a parameter, by our name without its layer; None: the whole."""
        module, _, kind = ours.partition(".")
        if module in _LAST and self.splits_inputs(module, is_plain=is_plain):
            inputs = {"output": self.queries, "down": self.mlp, "shared_down": self.shared_mlp}[module]
            return Slice(1, (inputs[self.shard.rank],)) if kind == "weight" else None
        ranges = self._outputs(module)
        return None if ranges is None else Slice(0, ranges)

    def _outputs(self, module: str) -> tuple[range, ...] | None:
        a, rank, heads = self.whole, self.shard.rank, self.heads[self.shard.rank]
        if module == "qkv":
            return qkv_rows(a, heads)
        if module in ("q_norm", "k_norm"):
            is_each_own = a.qk_norm is not None and a.qk_norm.per_head and not a.qk_norm.shared
            return (self._rows(heads.queries if module == "q_norm" else heads.kv_heads),) if is_each_own else None
        if module in _LAST:
            return (self.hidden[rank],)
        if module in ("up", "shared_up"):
            own = (self.mlp if module == "up" else self.shared_mlp)[rank]
            total = a.intermediate_size if module == "up" or a.experts is None else a.experts.shared_size
            return (own, range(total + own.start, total + own.stop)) if a.gated else (own,)
        if module in _TABLES and self.tokens:
            return (self.tokens[rank],)
        return None

    def _rows(self, heads: range) -> range:
        return _scaled(heads, self.whole.head_dim)


def whole_heads(a: Architecture) -> HeadShare:
    """All of a model's."""
    return HeadShare(range(a.num_heads), range(a.num_kv_heads))


def qkv_rows(a: Architecture, heads: HeadShare) -> tuple[range, ...]:
    """Of a projection that has all queries, all keys, all values."""
    keys = range(a.num_heads + heads.kv_heads.start, a.num_heads + heads.kv_heads.stop)
    values = range(a.num_kv_heads + keys.start, a.num_kv_heads + keys.stop)
    return tuple(_scaled(part, a.head_dim) for part in (heads.queries, keys, values))


def grouped_qkv_rows(a: Architecture, heads: HeadShare) -> tuple[range, ...]:
    """Of a projection that has each key-value head after its queries: the same rows, in the same order."""
    group = a.num_heads // a.num_kv_heads
    places = [query // group * (group + 2) + query % group for query in heads.queries]
    for behind in (0, 1):
        places += [head * (group + 2) + group + behind for head in heads.kv_heads]
    ranges: list[range] = []
    for place in places:
        if ranges and ranges[-1].stop == place:
            ranges[-1] = range(ranges[-1].start, place + 1)
        else:
            ranges.append(range(place, place + 1))
    return tuple(_scaled(one, a.head_dim) for one in ranges)


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
