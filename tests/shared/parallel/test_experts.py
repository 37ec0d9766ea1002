"""Which experts and which of their outputs are a rank's, for every number of ranks."""

import pytest

from shared.models.architecture import Experts
from shared.parallel.experts import ExpertPartition, ExpertShard, expert_shard_of
from shared.parallel.sharding import Shard
from shared.policies.table import architecture_of
from tests.megatron_moe import SIZES

MIXTRAL = architecture_of(
    {
        "model_type": "mixtral",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 12,
    }
)
PYRAMID = architecture_of({**SIZES, "num_experts": [2, 4]})


@pytest.mark.parametrize("size", range(1, 9))
def test_every_output_of_every_expert_is_one_ranks(size: int) -> None:
    for ep_size in (n for n in range(1, size + 1) if size % n == 0 and 12 % n == 0):
        partitions = [ExpertPartition(MIXTRAL, ExpertShard.of(rank, size, ep_size)) for rank in range(size)]
        held = sorted(
            (expert, row)
            for own in partitions
            for expert in own.numbers(0)
            for part in own.slice_of("experts_up").ranges
            for row in part
        )
        assert held == [(expert, row) for expert in range(12) for row in range(320)]
        for own in partitions:
            gate, up = own.slice_of("experts_up").ranges
            assert [row + 160 for row in gate] == list(up), "a feature's gate is where the feature is"
            assert own.shape("experts_up", 1, (12, 320, 64)) == (12 // ep_size, len(gate) + len(up), 64)
            assert own.shape("experts_down", 1, (12, 64, 160)) == (
                12 // ep_size,
                len(own.hidden[own.shard.mp.rank]),
                160,
            )


def test_ranks_are_grouped_as_by_deepspeed() -> None:
    shards = [ExpertShard.of(rank, 4, 2) for rank in range(4)]
    assert [(shard.ep.rank, shard.mp.rank) for shard in shards] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all((shard.ep.size, shard.mp.size) == (2, 2) for shard in shards)


def test_experts_that_are_not_gated_have_one_range() -> None:
    own = ExpertPartition(PYRAMID, ExpertShard.of(1, 4, 2))
    assert own.slice_of("experts_up").ranges == (range(64),), "two grains of three"
    assert [own.numbers(layer) for layer in range(4)] == [range(0), range(1, 2), range(0), range(2, 4)]


def test_ranks_that_share_a_model_share_each_expert() -> None:
    assert expert_shard_of(MIXTRAL, Shard(1, 2)) == ExpertShard(Shard(0, 1), Shard(1, 2))
    assert expert_shard_of(MIXTRAL, None) is None
    assert expert_shard_of(architecture_of({**SIZES, "num_experts": [1]}), Shard(1, 2)) is None


@pytest.mark.parametrize(("size", "ep_size"), [(2, 3), (4, 3), (2, 4), (3, 0)])
def test_ep_size_divides_the_ranks(size: int, ep_size: int) -> None:
    with pytest.raises(ValueError, match=f"^Invalid ep_size={ep_size} for world_size={size}: use a divisor"):
        ExpertShard.of(0, size, ep_size)


def test_ep_size_divides_the_experts_of_every_layer() -> None:
    assert isinstance(PYRAMID.experts, Experts)
    with pytest.raises(ValueError, match=r"^Invalid ep_size=4 for the 2 experts of layer 1: use a divisor of them"):
        ExpertPartition(PYRAMID, ExpertShard.of(0, 4, 4))
    with pytest.raises(ValueError, match=r"^the model has no experts"):
        ExpertPartition(architecture_of({**SIZES, "num_experts": [1]}), ExpertShard.of(0, 2, 2))
    with pytest.raises(ValueError, match=r"^64 hidden features cannot be cut for 65 ranks"):
        ExpertPartition(MIXTRAL, ExpertShard.of(0, 65, 1))
