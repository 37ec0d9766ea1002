"""How a parameter is cut for the ranks of a tensor-parallel group, as plain arithmetic on rows or columns.

A column-parallel linear has its outputs (rows of the weight, and its bias) on the ranks; a row-parallel one its inputs
(columns), and every rank the whole bias, which is added once. Attention is cut in whole heads: the first ranks have one
more where heads do not divide, queries stay with their key-value head, and where those are fewer than ranks, each lies
on several. A vocabulary is padded with rows of zeros until it divides.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

# even: in equal shares. q, kv: query heads, key-value heads. group: a key-value head after its queries, per group.
Part = Literal["even", "q", "kv", "group", "vocabulary"]
Span = tuple[int, int]  # the first row or column, and the one after the last
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")


@dataclass(frozen=True)
class Sizes:
    """What of a model decides where it is cut; None = unknown: equal shares, and a vocabulary as it is stored."""

    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.num_kv_heads and (not self.num_heads or self.num_heads % self.num_kv_heads):
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> "Sizes":
        """From a Hugging Face config.json, under any of the names that families give these."""
        nested = config.get("attn_config")  # of mpt
        fields = {**(nested if isinstance(nested, Mapping) else {}), **config}

        def first(names: Sequence[str]) -> int | None:
            return next((value for name in names if isinstance(value := fields.get(name), int) and value > 0), None)

        heads, kv_heads = first(HEADS), first(KV_HEADS)
        # falcon's config has a number of key-value heads that its older decoder does not use
        if "multi_query" in fields and not fields.get("new_decoder_architecture"):
            kv_heads = 1 if fields["multi_query"] else heads
        return cls(heads, kv_heads if heads else None, first(("vocab_size",)))

    @property
    def kv_heads(self) -> int | None:
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True)
class Cut:
    """dim: 0 = rows, 1 = columns, None = whole on every rank. parts: stretches of it that are each cut, in order."""

    dim: Literal[0, 1] | None
    parts: tuple[Part, ...] = ("even",)

    def spans(self, length: int, rank: int, ranks: int, sizes: Sizes) -> tuple[Span, ...]:
        """The ranges of a whole's `length` that lie on a rank, in order; past its end lies padding.

        Raises ValueError saying why it cannot be cut.
        """
        if self.parts == ("vocabulary",):
            share = -(-length // ranks)
            return ((rank * share, (rank + 1) * share),)
        units = self._units(ranks, sizes)
        if length % sum(units):
            raise ValueError(f"{length} {_LINES[self.dim or 0]} cannot be cut into {sum(units)} equal parts")
        unit, first, spans = length // sum(units), 0, []
        for part, count in zip(self.parts, units, strict=True):
            start, stop = self._share(part, rank, ranks, sizes)
            spans.append(((first + start) * unit, (first + stop) * unit))
            first += count
        return tuple(spans)

    def whole(self, length: int, rank: int, ranks: int, sizes: Sizes) -> int:
        """The length of the whole, padding included, from that of a rank's share. ValueError if there is none."""
        if self.parts == ("vocabulary",):
            return length * ranks
        shares = [self._share(part, rank, ranks, sizes) for part in self.parts]
        held = sum(stop - start for start, stop in shares)
        if length % held:
            raise ValueError(f"{length} {_LINES[self.dim or 0]} are not {held} equal parts")
        return length // held * sum(self._units(ranks, sizes))

    def trimmed(self, length: int, sizes: Sizes) -> int:
        """The length of the whole without its padding. ValueError if it has fewer rows than the vocabulary."""
        if self.parts != ("vocabulary",) or sizes.vocab_size is None:
            return length
        if length < sizes.vocab_size:
            raise ValueError(f"it has {length} rows, but the vocabulary {sizes.vocab_size}")
        return sizes.vocab_size

    def _units(self, ranks: int, sizes: Sizes) -> tuple[int, ...]:
        """How many heads each part has; or one share for each rank."""
        known = {"q": sizes.num_heads, "kv": sizes.kv_heads, "group": sizes.kv_heads}
        if not sizes.num_heads and len(set(self.parts)) > 1:
            raise ValueError("its parts have as many rows as the model has heads and key-value heads: give these sizes")
        return tuple(known.get(part) or ranks for part in self.parts)

    def _share(self, part: Part, rank: int, ranks: int, sizes: Sizes) -> Span:
        """What of a part's heads lies on a rank."""
        heads, kv_heads = sizes.num_heads, sizes.kv_heads
        if part == "even" or not heads or not kv_heads:
            return rank, rank + 1
        if heads < ranks:
            raise ValueError(f"{heads} heads cannot be cut for {ranks} ranks")
        if kv_heads >= ranks:
            start, stop = balanced(kv_heads, rank, ranks)
            per_group = heads // kv_heads if part == "q" else 1
            return start * per_group, stop * per_group
        if ranks % kv_heads or heads % ranks or part == "group":
            raise ValueError(f"{heads} heads on {kv_heads} key-value heads cannot be cut for {ranks} ranks")
        if part == "kv":
            return rank * kv_heads // ranks, rank * kv_heads // ranks + 1
        return rank * heads // ranks, (rank + 1) * heads // ranks


_LINES = ("rows", "columns")


def balanced(count: int, rank: int, ranks: int) -> Span:
    """Which of `count` things are a rank's: the first ranks have one more."""
    share, more = divmod(count, ranks)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)


@dataclass(frozen=True)
class CutTable:
    """Which cut each parameter has.

    rules: regular expressions of the last parts of a name, the first that fits counts. named: whole names, which come
    before the rules.
    """

    rules: tuple[tuple[str, Cut], ...] = ()
    sizes: Sizes = Sizes()
    named: Mapping[str, Cut] = field(default_factory=dict)

    def of(self, name: str) -> Cut | None:
        """None where no rule fits."""
        if name in self.named:
            return self.named[name]
        return next((cut for rule, cut in self._compiled if rule.search(name)), None)

    def sized(self, sizes: Sizes) -> "CutTable":
        """The same rules for a model of such sizes."""
        return replace(self, sizes=sizes)

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Cut]]:
        return [(re.compile(rf"(?:^|\.)(?:{rule})$"), cut) for rule, cut in self.rules]
