"""Shards that are split and merged: the bytes come back, at any degree."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint import CheckpointError, CutTable, MappingCheckpoint, Sizes, TensorParallelCheckpoint
from shared.checkpoint.contract import Checkpoint
from shared.checkpoint.cut_tables import (
    COLUMN_PARALLEL,
    GATE_UP,
    KEYS,
    OUTPUT,
    QKV,
    QUERIES,
    ROW_PARALLEL,
    VOCABULARY,
    WHOLE,
)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 16, 8, 4, 2, 24, 50
SIZES = Sizes(HEADS, KV_HEADS, VOCAB)
TABLE = CutTable(
    (
        (r"embedding", VOCABULARY),
        (r"norm|o\.bias|down\.bias", WHOLE),
        (r"q\.(weight|bias)", QUERIES),
        (r"k\.weight", KEYS),
        (r"qkv\.(weight|bias)", QKV),
        (r"o\.weight", OUTPUT),
        (r"gate_up\.weight", GATE_UP),
        (r"up\.(weight|bias)", COLUMN_PARALLEL),
        (r"down\.weight", ROW_PARALLEL),
    ),
    SIZES,
)
SHAPES = {
    "embedding": (VOCAB, HIDDEN),
    "norm": (HIDDEN,),
    "q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "q.bias": (HEADS * HEAD_DIM,),
    "k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "qkv.bias": ((HEADS + 2 * KV_HEADS) * HEAD_DIM,),
    "o.weight": (HIDDEN, HEADS * HEAD_DIM),
    "o.bias": (HIDDEN,),
    "gate_up.weight": (2 * INNER, HIDDEN),
    "up.weight": (INNER, HIDDEN),
    "up.bias": (INNER,),
    "down.weight": (HIDDEN, INNER),
    "down.bias": (HIDDEN,),
}
DEGREES = (1, 2, 4)


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def split(whole: Checkpoint, ranks: int, table: CutTable = TABLE) -> list[TensorParallelCheckpoint]:
    return [TensorParallelCheckpoint([whole], table, rank, ranks) for rank in range(ranks)]


def held(checkpoint: Checkpoint) -> MappingCheckpoint:
    """A copy of what a checkpoint gives, as a file would hold it."""
    return MappingCheckpoint({name: checkpoint.tensor(name).clone().contiguous() for name in checkpoint.names()})


def assert_equal(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert checkpoint.names() == set(expected)
    for name, value in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == value.dtype, name
        assert torch.equal(found, value), name


def by_hand(whole: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's shard, by torch's own chunks."""

    def chunk(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(ranks, dim)[rank]

    def fused(name: str, *parts: int) -> Tensor:
        return torch.cat([chunk(part) for part in whole[name].split(parts)])

    rows = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    share = -(-VOCAB // ranks)
    padded = torch.cat([whole["embedding"], torch.zeros(share * ranks - VOCAB, HIDDEN)])
    return {
        "embedding": chunk(padded),
        **{name: whole[name] for name in ("norm", "o.bias", "down.bias")},
        **{name: chunk(whole[name]) for name in ("q.weight", "q.bias", "k.weight", "up.weight", "up.bias")},
        "qkv.weight": fused("qkv.weight", *rows),
        "qkv.bias": fused("qkv.bias", *rows),
        "gate_up.weight": fused("gate_up.weight", INNER, INNER),
        **{name: chunk(whole[name], 1) for name in ("o.weight", "down.weight")},
    }


@pytest.mark.parametrize("ranks", DEGREES)
def test_a_shard_is_what_one_cuts_by_hand(ranks: int) -> None:
    whole = model()
    for rank, shard in enumerate(split(MappingCheckpoint(whole), ranks)):
        assert_equal(shard, by_hand(whole, rank, ranks))


@pytest.mark.parametrize(("stored", "ranks"), [*itertools.product(DEGREES, (1, 2, 4, 8))])
def test_from_any_degree_to_any(stored: int, ranks: int) -> None:
    whole = MappingCheckpoint(model())
    shards = [held(shard) for shard in split(whole, stored)]
    for rank, expected in enumerate(split(whole, ranks)):
        again = TensorParallelCheckpoint(shards, TABLE, rank, ranks)
        assert_equal(again, {name: expected.tensor(name) for name in SHAPES})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_bytes_come_back_in_every_dtype(dtype: torch.dtype) -> None:
    whole = model(dtype)
    assert_equal(TensorParallelCheckpoint(split(MappingCheckpoint(whole), 4), TABLE), whole)


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 3), (7, 7), (12, 6)])
def test_heads_that_do_not_divide(heads: int, kv_heads: int) -> None:
    """The first ranks have one more, in any of the degrees that there are heads for."""
    table = TABLE.sized(Sizes(heads, kv_heads))
    whole = {
        "q.weight": torch.randn(heads * HEAD_DIM, HIDDEN),
        "qkv.weight": torch.randn((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN),
        "o.weight": torch.randn(HIDDEN, heads * HEAD_DIM),
    }
    source = MappingCheckpoint(whole)
    for stored, ranks in itertools.product((1, 2, 3), (1, 2, 3)):
        shards = [held(shard) for shard in split(source, stored, table)]
        for rank, expected in enumerate(split(source, ranks, table)):
            found = TensorParallelCheckpoint(shards, table, rank, ranks)
            assert_equal(found, {name: expected.tensor(name) for name in whole})
    sizes = [shard.tensor("q.weight").shape[0] for shard in split(source, 2, table)]
    assert sizes[0] >= sizes[1] > 0
    assert sum(sizes) == heads * HEAD_DIM


def test_few_key_value_heads_lie_on_several_ranks() -> None:
    table = TABLE.sized(Sizes(8, 2))
    whole = {"k.weight": torch.randn(2 * HEAD_DIM, HIDDEN), "qkv.weight": torch.randn(12 * HEAD_DIM, HIDDEN)}
    shards = [held(shard) for shard in split(MappingCheckpoint(whole), 4, table)]
    assert torch.equal(shards[0].tensor("k.weight"), whole["k.weight"][:HEAD_DIM])
    assert torch.equal(shards[0].tensor("k.weight"), shards[1].tensor("k.weight"))
    assert torch.equal(shards[3].tensor("k.weight"), whole["k.weight"][HEAD_DIM:])
    assert_equal(TensorParallelCheckpoint(shards, table), whole)


def test_a_bias_of_rank_0_alone() -> None:
    whole = model()
    shards = [held(shard) for shard in split(MappingCheckpoint(whole), 2)]
    rest = {name: shards[1].tensor(name) for name in SHAPES if name != "o.bias"}
    assert_equal(TensorParallelCheckpoint([shards[0], MappingCheckpoint(rest)], TABLE), whole)


def test_a_vocabulary_with_more_padding_than_it_needs() -> None:
    """Megatron pads to a multiple of 128 times the degree."""
    embedding = torch.randn(VOCAB, HIDDEN)
    padded = torch.cat([embedding, torch.randn(14, HIDDEN)])
    shards = [MappingCheckpoint({"embedding": part}) for part in padded.chunk(4)]
    assert_equal(TensorParallelCheckpoint(shards, TABLE), {"embedding": embedding})
    for rank in range(3):
        found = TensorParallelCheckpoint(shards, TABLE, rank, 3).tensor("embedding")
        expected = torch.cat([embedding, torch.zeros(1, HIDDEN)]).chunk(3)[rank]
        assert torch.equal(found, expected)
    unknown = TABLE.sized(Sizes())
    assert_equal(TensorParallelCheckpoint(shards, unknown), {"embedding": padded})
    with pytest.raises(CheckpointError, match="embedding: it has 64 rows, but the vocabulary 65"):
        TensorParallelCheckpoint(shards, TABLE.sized(Sizes(vocab_size=65))).tensor("embedding")


def test_what_cannot_be_cut_is_named() -> None:
    whole = MappingCheckpoint(model())
    with pytest.raises(CheckpointError, match=r"q\.weight: 8 heads on 4 key-value heads cannot be cut for 5 ranks"):
        TensorParallelCheckpoint([whole], TABLE, 0, 5).tensor("q.weight")
    with pytest.raises(CheckpointError, match=r"q\.weight: 8 heads cannot be cut for 9 ranks"):
        TensorParallelCheckpoint([whole], TABLE, 0, 9).tensor("q.weight")
    with pytest.raises(CheckpointError, match=r"up\.weight: 24 rows cannot be cut into 5 equal parts"):
        TensorParallelCheckpoint([whole], TABLE, 0, 5).tensor("up.weight")
    with pytest.raises(CheckpointError, match=r"o\.weight has no dimension 1: \[16\]"):
        TensorParallelCheckpoint([MappingCheckpoint({"o.weight": torch.ones(16)})], TABLE, 0, 2).tensor("o.weight")
    odd = TensorParallelCheckpoint([MappingCheckpoint({"odd": torch.ones(4)})], TABLE, 0, 2)
    with pytest.raises(CheckpointError, match="odd: no rule says how it is cut for 2 ranks"):
        odd.tensor("odd")
    with pytest.raises(KeyError):
        odd.tensor("nothing")
    with pytest.raises(ValueError, match="rank must be one of 2, got 2"):
        TensorParallelCheckpoint([whole], TABLE, 2, 2)


def test_shards_that_do_not_go_together() -> None:
    def joined(name: str, *parts: Tensor) -> Tensor:
        return TensorParallelCheckpoint([MappingCheckpoint({name: part}) for part in parts], TABLE).tensor(name)

    ones = torch.ones
    with pytest.raises(CheckpointError, match=r"up\.weight is float32 \[4, 3\], but float32 \[4, 2\]"):
        joined("up.weight", ones(4, 3), ones(4, 2))
    with pytest.raises(CheckpointError, match=r"up\.weight is float32 \[4, 3\], but bfloat16 \[4, 3\]"):
        joined("up.weight", ones(4, 3), ones(4, 3).bfloat16())
    with pytest.raises(CheckpointError, match=r"norm is float32 \[4\], but float32 \[5\]"):
        joined("norm", ones(4), ones(5))
    with pytest.raises(CheckpointError, match=r"up\.weight: its parts of 4, 6 do not make one whole"):
        joined("up.weight", ones(4, 3), ones(6, 3))
    with pytest.raises(CheckpointError, match=r"q\.weight: 6 rows are not 4 equal parts"):
        joined("q.weight", ones(6, 3), ones(6, 3))
    assert torch.equal(joined("same", ones(4), ones(4)), ones(4))
    with pytest.raises(CheckpointError, match="same: no rule says how it is cut, and it is not the same"):
        joined("same", ones(4), torch.zeros(4))


def test_a_shard_that_lacks_a_part() -> None:
    whole, rest = model(), model()
    del rest["up.weight"]
    with pytest.raises(CheckpointError, match=r"the shard of rank 1 lacks up\.weight, which others have"):
        TensorParallelCheckpoint([MappingCheckpoint(whole), MappingCheckpoint(rest)], TABLE)


def quantized(out: int, columns: int, groups: int, *, offset: bool) -> Integers:
    values = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
    return Integers(8, values, torch.rand(out, groups), torch.rand(out, groups) if offset else None)


def assert_integers(found: Integers | None, expected: Integers) -> None:
    assert found is not None
    assert found.quantization == expected.quantization
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scale, expected.scale)
    assert (found.offset is None) == (expected.offset is None)
    assert found.offset is None or (expected.offset is not None and torch.equal(found.offset, expected.offset))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", ["up.weight", "down.weight", "q.weight", "qkv.weight"])
def test_integers_stay_what_they_are(name: str, groups: int, offset: bool) -> None:
    out = SHAPES[name][0]
    whole = quantized(out, 64, groups, offset=offset)
    source = MappingCheckpoint({name: whole})
    for stored, ranks in itertools.product(DEGREES, DEGREES):
        shards = [MappingCheckpoint({name: part}) for cut in split(source, stored) if (part := cut.integers(name))]
        assert len(shards) == stored
        for rank, expected in enumerate(split(source, ranks)):
            again, straight = TensorParallelCheckpoint(shards, TABLE, rank, ranks), expected.integers(name)
            assert straight is not None
            assert_integers(again.integers(name), straight)
            assert torch.equal(again.tensor(name), expected.tensor(name))
    assert_integers(TensorParallelCheckpoint([source], TABLE, 0, 1).integers(name), whole)


def test_shards_with_scales_of_their_own_become_groups() -> None:
    parts = [quantized(4, 16, 1, offset=False) for _ in range(2)]
    merged = TensorParallelCheckpoint([MappingCheckpoint({"down.weight": part}) for part in parts], TABLE)
    found = merged.integers("down.weight")
    assert found is not None
    assert torch.equal(found.scale, torch.cat([part.scale for part in parts], 1))
    assert torch.equal(found.values, torch.cat([part.values for part in parts], 1))
    expected = torch.cat([part.values * part.scale for part in parts], 1)
    assert torch.equal(merged.tensor("down.weight"), expected)


def test_integers_that_no_op_would_take_are_read_as_numbers() -> None:
    few = [quantized(4, 4, 1, offset=False) for _ in range(2)]
    merged = TensorParallelCheckpoint([MappingCheckpoint({"down.weight": part}) for part in few], TABLE)
    assert merged.integers("down.weight") is None, "groups of 4 columns"
    assert merged.tensor("down.weight").shape == (4, 8)
    mixed = [quantized(4, 16, 1, offset=offset) for offset in (False, True)]
    assert (
        TensorParallelCheckpoint([MappingCheckpoint({"up.weight": part}) for part in mixed], TABLE).integers(
            "up.weight"
        )
        is None
    )
    floats = MappingCheckpoint({"up.weight": torch.ones(4, 16)})
    half = [floats, MappingCheckpoint({"up.weight": mixed[0]})]
    assert TensorParallelCheckpoint(half, TABLE).integers("up.weight") is None
    assert TensorParallelCheckpoint(half, TABLE).tensor("up.weight").shape == (8, 16)
