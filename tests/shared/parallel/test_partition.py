"""Which part of each parameter is a rank's: together all of it, in order, each as large as the rank's record says."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from shared.models.architecture import Architecture
from shared.models.shapes import layer_shapes, model_shapes
from shared.parallel.partition import Partition, grouped_qkv_rows, qkv_rows, whole_heads
from shared.parallel.sharding import HeadShare, Shard
from shared.policies.table import architecture_of
from tests.tiny_models import KINDS, tiny_model

LAST = ("output.weight", "down.weight", "shared_down.weight")


def record(kind: str) -> Architecture:
    return architecture_of(json.loads((Path(tiny_model(kind)) / "config.json").read_text()))


def shapes_of(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Of the model's own and of all layers' parameters, by our names without layers."""
    shapes = model_shapes(a)
    for layer in range(a.num_layers):
        shapes |= layer_shapes(a, layer)
    return shapes


@pytest.mark.parametrize("splits_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_every_parameter_between_them(kind: str, splits_inputs: bool):
    a = record(kind)
    for size in (2, 3, 4):
        if a.num_kv_heads < size and size % a.num_kv_heads:
            continue
        ranks = [Partition(a, Shard(rank, size, splits_inputs=splits_inputs)) for rank in range(size)]
        for ours, shape in shapes_of(a).items():
            slices = [rank.slice_of(ours, is_plain=True) for rank in ranks]
            if slices[0] is None:
                assert slices == [None] * size
                continue
            dim = 1 if splits_inputs and ours in LAST else 0
            assert {one.dim for one in slices if one} == {dim}
            taken = [place for one in slices if one for part in one.ranges for place in part]
            assert set(taken) == set(range(shape[dim]))
            is_copied = a.num_kv_heads < size and ours.startswith(("qkv", "k_norm"))
            assert is_copied or len(taken) == shape[dim]
            # a part of each of q, k and v, or gate and up, in order
            assert all(part.stop <= other.start for one in slices if one for part, other in pairwise(one.ranges))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "stablelm-parallel", "qwen2_moe"])
def test_a_rank_has_parts_of_the_shapes_of_its_record(kind: str):
    a = record(kind)
    for rank in range(2):
        partition = Partition(a, Shard(rank, 2, splits_inputs=True))
        own = shapes_of(partition.own)
        for ours, shape in shapes_of(a).items():
            part = partition.slice_of(ours, is_plain=True)
            # the vocabulary, and experts with what they share, are of no rank's record
            if not ours.startswith(("embedding", "lm_head", "experts", "shared")):
                assert (shape if part is None else part.shape(shape)) == own[ours], ours


def test_what_is_quantized_is_cut_by_its_outputs():
    partition = Partition(record("llama"), Shard(1, 2, splits_inputs=True))
    plain, quantized = (partition.slice_of("down.weight", is_plain=is_plain) for is_plain in (True, False))
    assert plain is not None
    assert (plain.dim, plain.ranges) == (1, (range(64, 96),))
    assert quantized is not None
    assert (quantized.dim, quantized.ranges) == (0, (range(32, 64),))
    assert partition.splits_inputs("down", is_plain=True)
    assert not partition.splits_inputs("down", is_plain=False)
    assert not partition.splits_inputs("up", is_plain=True)


def test_norms_positions_and_routers_are_whole():
    for kind, ours in (("gpt2", "positions"), ("llama", "attention_norm.weight"), ("qwen2_moe", "router.weight")):
        assert Partition(record(kind), Shard(0, 2)).slice_of(ours, is_plain=True) is None
    # of all of a projection, or one weight for all heads
    for kind in ("olmo2", "qwen3"):
        assert Partition(record(kind), Shard(0, 2)).slice_of("q_norm.weight", is_plain=True) is None


def test_fused_rows_by_group_are_those_by_kind():
    """bloom's and gpt_neox's: each key-value head behind its queries."""
    a = record("falcon-new")
    assert (a.num_heads, a.num_kv_heads, a.head_dim) == (4, 2, 16)
    # q0 q1 k0 v0 q2 q3 k1 v1
    places = {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}

    def rows(heads: list[int]) -> list[int]:
        return [head * 16 + row for head in heads for row in range(16)]

    for heads in (whole_heads(a), HeadShare(range(1, 2), range(1)), HeadShare(range(2, 4), range(1, 2))):
        wanted = [places["q"][head] for head in heads.queries]
        wanted += [places["k"][head] for head in heads.kv_heads] + [places["v"][head] for head in heads.kv_heads]
        assert [row for part in grouped_qkv_rows(a, heads) for row in part] == rows(wanted)
        plain = [*heads.queries, *(4 + head for head in heads.kv_heads), *(6 + head for head in heads.kv_heads)]
        assert [row for part in qkv_rows(a, heads) for row in part] == rows(plain)
