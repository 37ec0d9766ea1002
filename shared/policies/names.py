"""Where our parameters lie in a checkpoint: its names, and how what is there is cut, turned and joined.

    rows("q.weight", "k.weight", "v.weight")   joined along the output features, in this order
    columns("c_attn.weight")                   stored [in, out], as GPT-2's Conv1D keeps it: transposed
    grouped("query_key_value.weight")          fused by key-value head: its queries, its key, its value; then the next
    product("embed.weight", "project.weight")  their matrix product, float32: the second [hidden, width] lifts the first
    lifted("head.weight", "project.weight")    the same, of a second [width, hidden]
    stacked("experts.gate_up_proj")            [experts, out, in] in one tensor
    shaped("patch_embedding.weight")           as many values in the same order, under other dimensions
    ones()                                     nothing: the weight of a norm that has none
    either(rows("a"), rows("b"))               the first whose names are all there

`{layer}` and `{expert}` in a name are their numbers; a name with `{head}` stands for those of all heads, in order.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

How = Literal["rows", "columns", "grouped", "product", "lifted", "stacked", "shaped", "ones"]


@dataclass(frozen=True)
class Source:
    """One parameter of ours; see the module."""

    names: tuple[str, ...]
    how: How = "rows"

    def at(self, layer: int = 0, expert: int = 0, heads: int = 0) -> Source:
        """With its numbers filled in; a name of each head becomes those of all of them."""
        every = [
            name.format(layer=layer, expert=expert, head=head)
            for name in self.names
            for head in range(heads if "{head}" in name else 1)
        ]
        return Source(tuple(every), self.how)


Names = Mapping[str, tuple[Source, ...]]


def rows(*names: str) -> tuple[Source, ...]:
    return (Source(names),)


def columns(*names: str) -> tuple[Source, ...]:
    return (Source(names, "columns"),)


def grouped(name: str) -> tuple[Source, ...]:
    return (Source((name,), "grouped"),)


def product(table: str, projection: str) -> tuple[Source, ...]:
    """table [vocab, width] @ projection.T, of a projection [hidden, width]."""
    return (Source((table, projection), "product"),)


def lifted(table: str, projection: str) -> tuple[Source, ...]:
    """table [vocab, width] @ projection, of a projection [width, hidden]."""
    return (Source((table, projection), "lifted"),)


def stacked(name: str) -> tuple[Source, ...]:
    return (Source((name,), "stacked"),)


def shaped(name: str) -> tuple[Source, ...]:
    return (Source((name,), "shaped"),)


def ones() -> tuple[Source, ...]:
    return (Source((), "ones"),)


def either(*alternatives: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(source for sources in alternatives for source in sources)


def affine(ours: str, theirs: str, make=rows) -> dict[str, tuple[Source, ...]]:
    """The entries of a weight and a bias. A bias that the architecture does without is not looked for."""
    return {f"{ours}.{kind}": make(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def choose(sources: tuple[Source, ...], present: Collection[str]) -> Source:
    """The first whose names are all there (of experts, the first expert's of any layer); the first of all otherwise."""
    for source in sources:
        if all(_is_there(name, present) for name in source.names):
            return source
    return sources[0]


def _is_there(name: str, present: Collection[str]) -> bool:
    if "{" not in name:
        return name in present
    numbered = _pattern(name)
    return any(numbered.fullmatch(one) for one in present)


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    """With any number in the place of each."""
    return re.compile(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(name)))
