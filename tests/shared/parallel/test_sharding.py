"""Which heads and features of a model are a rank's: every grid of them, and the errors of those that do not fit."""

import itertools
from dataclasses import replace

import pytest

from shared.models.architecture import Architecture
from shared.parallel.sharding import HeadShare, Shard, cut, head_shares, rank_architecture

GRIDS = list(itertools.product(range(1, 41), range(1, 11), range(1, 9)))


def refused(heads: int, kv_heads: int, ranks: int) -> str | None:
    """What the error says of a grid that does not fit, in words of its own."""
    if heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key-value heads"
    if heads < ranks:
        return f"{heads} query heads cannot be cut for {ranks} ranks, each needs one"
    if kv_heads < ranks and ranks % kv_heads:
        return f"{kv_heads} key-value heads cannot be cut for {ranks} ranks, nor copied"
    return None


def test_every_grid_covers_each_head_in_order_and_evenly():
    fitting = [grid for grid in GRIDS if refused(*grid) is None]
    assert 600 < len(fitting) < len(GRIDS)
    for heads, kv_heads, ranks in fitting:
        shares = head_shares(heads, kv_heads, ranks)
        group = heads // kv_heads
        assert len(shares) == ranks
        assert [query for share in shares for query in share.queries] == list(range(heads))
        counts = [len(share.queries) for share in shares]
        for share in shares:
            # each query finds its key-value head, as many queries each
            assert list(share.kv_heads) == sorted({query // group for query in share.queries})
            readers = [sum(query // group == head for query in share.queries) for head in share.kv_heads]
            assert min(readers) == max(readers) > 0
        copies = [sum(head in share.kv_heads for share in shares) for head in range(kv_heads)]
        if kv_heads >= ranks:
            assert set(copies) == {1}
            assert max(counts) - min(counts) <= group
            assert counts == sorted(counts, reverse=True)
        else:
            assert set(copies) == {ranks // kv_heads}
            assert max(counts) - min(counts) <= 1


def test_every_other_grid_is_refused_by_name():
    for heads, kv_heads, ranks in GRIDS:
        message = refused(heads, kv_heads, ranks)
        if message is not None:
            with pytest.raises(ValueError, match=message):
                head_shares(heads, kv_heads, ranks)


def deepspeed_takes(heads: int, kv_heads: int, ranks: int) -> bool:
    """Its rules of model_implementations/sharding/qkv.py."""
    if heads == kv_heads:
        return heads >= ranks
    if kv_heads >= ranks:
        return kv_heads % ranks == 0 and heads % kv_heads == 0
    return ranks % kv_heads == 0 and heads % ranks == 0 and heads % kv_heads == 0


def test_whatever_deepspeed_cuts_is_cut_and_more():
    theirs = {grid for grid in GRIDS if deepspeed_takes(*grid)}
    ours = {grid for grid in GRIDS if refused(*grid) is None}
    assert theirs < ours
    more = ours - theirs
    assert (15, 5, 3) in more  # key-value heads that ranks do not divide
    assert (9, 3, 2) in more  # SmolLM2-135M's heads
    assert (10, 2, 4) in more  # five queries on two ranks


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((4, 2, 2), [(range(2), range(1)), (range(2, 4), range(1, 2))]),
        ((9, 3, 2), [(range(6), range(2)), (range(6, 9), range(2, 3))]),
        ((5, 1, 2), [(range(3), range(1)), (range(3, 5), range(1))]),
        ((4, 4, 3), [(range(2), range(2)), (range(2, 3), range(2, 3)), (range(3, 4), range(3, 4))]),
    ],
)
def test_heads_of(grid: tuple[int, int, int], expected: list[tuple[range, range]]):
    assert head_shares(*grid) == [HeadShare(*one) for one in expected]


def test_a_cut_is_contiguous_and_as_even_as_its_grains_allow():
    for total, parts, grain in itertools.product(range(0, 130, 7), range(1, 9), (1, 2, 16, 32)):
        ranges = cut(total, parts, grain)
        assert len(ranges) == parts
        assert [one for part in ranges for one in part] == list(range(total))
        assert all(part.start % grain == 0 for part in ranges if len(part))
        grains = [-(-len(part) // grain) for part in ranges]
        assert max(grains) - min(grains) <= 1


@pytest.mark.parametrize(
    ("total", "grain", "widths"),
    [
        (96, 32, [64, 32]),
        (128, 32, [64, 64]),
        (64, 32, [32, 16, 16]),
        (7, 32, [4, 2, 1]),
        (5, 32, [1] * 5),
        (576, 64, [192] * 3),
    ],
)
def test_no_rank_is_left_without_a_share(total: int, grain: int, widths: list[int]):
    size = len(widths)
    shards = [Shard(rank, size, grain) for rank in range(size)]
    assert [len(shard.share(total)) for shard in shards] == widths
    with pytest.raises(ValueError, match=rf"^{size - 1} rows cannot be cut for {size} ranks: use {size - 1} or fewer$"):
        Shard(0, size, grain).shares(size - 1, "rows")


@pytest.mark.parametrize(
    ("fields", "named"), [((2, 2), "rank"), ((-1, 2), "rank"), ((0, 0), "rank"), ((0, 1, 0), "grain")]
)
def test_a_shard_that_is_none_is_refused(fields: tuple[int, ...], named: str):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        Shard(*fields)


def test_a_rank_has_its_heads_their_slopes_and_its_features():
    whole = Architecture(
        family="llama",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_context=64,
        norm_eps=1e-5,
        activation="silu",
        ropes=(None,),
        sliding_window=(None,),
        attention_scale=1.0,
        alibi_slopes=(0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    )
    ranks = [rank_architecture(whole, Shard(rank, 4)) for rank in range(4)]
    assert [(a.num_heads, a.num_kv_heads) for a in ranks] == [(2, 1), (1, 1), (2, 1), (1, 1)]
    assert sum((a.alibi_slopes for a in ranks), ()) == whole.alibi_slopes
    assert sum(a.intermediate_size for a in ranks) == 96
    own = {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 96, "alibi_slopes": whole.alibi_slopes}
    assert all(replace(a, **own) == whole for a in ranks)
    with pytest.raises(ValueError, match="3 key-value heads"):
        rank_architecture(replace(whole, num_kv_heads=3), Shard(0, 4))
