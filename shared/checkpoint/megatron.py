"""Megatron-LM's GPT-2: nested state dicts, and fused rows in an order that depends on the checkpoint's version.

Rows of query_key_value on a rank, by version:

    0       [3, heads, head_dim]
    1.0     [heads, head_dim, 3]
    2.0 up  [heads, 3, head_dim]

Here they are all queries, then all keys, then all values, and names are flat and dotted:

    word_embeddings.weight   position_embeddings.weight   transformer.final_layernorm.weight
    transformer.layers.N. (input_layernorm | post_attention_layernorm | attention.query_key_value | attention.dense |
                           mlp.dense_h_to_4h | mlp.dense_4h_to_h) . (weight | bias)

What DeepSpeed-MoE's layers have in the place of an MLP keeps its names: mlp.deepspeed_moe.gate.wg.weight and others.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint, CheckpointError, UnsupportedCheckpointError, place_of
from shared.checkpoint.cut_tables import MEGATRON
from shared.checkpoint.cuts import CutTable, Sizes
from shared.checkpoint.tensor_parallel import TensorParallelCheckpoint

_FUSED = re.compile(r"\.attention\.query_key_value\.(weight|bias)$")
_MAX_DEPTH = 16
# What makes it Megatron's, besides what others call alike.
_OWN = re.compile(r"(^|\.)(transformer|encoder)\.layers\.\d+\.(self_)?attention\.query_key_value\.")
# Looked for in every file, as DeepSpeed does; of an MLP or of experts.
_NEEDED = (
    "attention.dense.weight",
    "dense_4h_to_h.weight",
    "attention.query_key_value",
    "dense_h_to_4h.weight",
    "dense_h_to_4h.bias",
)


class MegatronShard:
    """One rank's file: any checkpoint with Megatron's names, read by the flat ones and in one order of rows.

    heads: of this rank; None = unknown, which only version 0 allows.
    Raises CheckpointError for a version that is not known, and naming parameters that it lacks.
    """

    def __init__(self, checkpoint: Checkpoint, version: object, heads: int | None) -> None:
        self._checkpoint, self._version, self._heads = checkpoint, version_of(version), heads
        self._stored = {flat_name(name): name for name in checkpoint.names()}
        for needed in _NEEDED:
            if not any(needed in name for name in self._stored):
                raise CheckpointError(
                    f"key: {needed} is not found in the checkpoint{place_of(checkpoint, *checkpoint.names())}"
                )
        if self._version > 0 and heads is None:
            raise CheckpointError(
                f"the rows of query_key_value are mixed head by head{place_of(checkpoint, *checkpoint.names())} "
                f"(checkpoint version {version}): give the number of heads"
            )

    def names(self) -> set[str]:
        return set(self._stored)

    def file_of(self, name: str) -> str:
        return place_of(self._checkpoint, self._stored[name]).removeprefix(" in ")

    def tensor(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(self._stored[name])
        return self._ordered(name, tensor) if _FUSED.search(name) else tensor

    def integers(self, name: str) -> Integers | None:
        integers = self._checkpoint.integers(self._stored[name])
        if integers is None or not _FUSED.search(name):
            return integers
        parts = (integers.values, integers.scale, integers.offset)
        values, scale, offset = (None if part is None else self._ordered(name, part) for part in parts)
        assert values is not None
        assert scale is not None
        return replace(integers, values=values, scale=scale, offset=offset)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Queries, keys, values, each head by head: of rows [3 * heads * head_dim, ...]."""
        if len(rows) % (3 * (self._heads or 1)):
            raise CheckpointError(
                f"{name}{place_of(self, name)} has {len(rows)} rows, which are not 3 x {self._heads or 1} heads"
            )
        if self._version == 0:
            return rows
        if self._version == 1:
            return rows.unflatten(0, (self._heads or 1, -1, 3)).movedim(2, 0).flatten(0, 2)
        return rows.unflatten(0, (self._heads or 1, 3, -1)).movedim(1, 0).flatten(0, 2)


def megatron_checkpoint(
    shards: Sequence[Checkpoint],
    version: object,
    *,
    sizes: Sizes,
    table: CutTable = MEGATRON,
    rank: int = 0,
    ranks: int = 1,
) -> Checkpoint:
    """A model, or a rank's part of it, from the files of a Megatron group, the first of them rank 0's.

    More files than ranks are merged, fewer are split; one number must divide the other.
    """
    if sizes.num_kv_heads not in (None, sizes.num_heads):
        raise UnsupportedCheckpointError("query_key_value with fewer key-value heads is not read from Megatron's files")
    if max(len(shards), ranks) % min(len(shards), ranks):
        what = "merge" if len(shards) > ranks else "split"
        raise UnsupportedCheckpointError(
            f"Invalid checkpoints and world size for sd {what}: {len(shards)} files for {ranks} ranks"
        )
    if sizes.num_heads and sizes.num_heads % len(shards):
        raise CheckpointError(
            f"transformer.layers.0.attention.query_key_value.weight: {sizes.num_heads} heads cannot lie in "
            f"{len(shards)} files{place_of(shards[0], *shards[0].names())} and others"
        )
    heads = sizes.num_heads and sizes.num_heads // len(shards)
    parts = [MegatronShard(shard, version, heads) for shard in shards]
    return TensorParallelCheckpoint(parts, table.sized(sizes), rank, ranks)


def version_of(version: object) -> int:
    """0, 1 or 2, the versions that differ. UnsupportedCheckpointError for what is no version."""
    if isinstance(version, int | float) and not isinstance(version, bool) and math.isfinite(version):
        if version >= 2:
            return 2
        if version in (0, 1):
            return int(version)
    raise UnsupportedCheckpointError(f"checkpoint version: {version} is not supported")


def is_megatron(names: Iterable[str]) -> bool:
    """Whether these are Megatron's names, nested or flat."""
    return any(_OWN.search(name) for name in names)


def flattened(values: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Nested dictionaries as dotted names. Raises CheckpointError for more of them in each other than any model has."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{prefix[:60]}… is nested more than {_MAX_DEPTH} deep")
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def flat_name(name: str) -> str:
    """`language_model.encoder.layers.3.self_attention.dense.bias` → `transformer.layers.3.attention.dense.bias`."""
    name = re.sub(r"^((module|model|language_model|embedding)\.)+", "", name)
    name = re.sub(r"^encoder\.", "transformer.", name)
    return re.sub(r"^(transformer\.layers\.\d+\.)self_attention\.", r"\1attention.", name)
