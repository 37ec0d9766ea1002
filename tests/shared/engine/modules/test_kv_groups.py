"""The caches of a KvCacheConfig: a pool and numbers of its own for each group, and what a sequence may hold."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_format import ELEMENTS
from shared.batch import NULL_BLOCK, BatchEntry, build_batch
from shared.block_allocator import OutOfBlocks
from shared.config import KvCacheConfig
from shared.config.modules import SelfAttentionConfig
from shared.engine.modules import KvGroups, SelfAttention


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_pool_for_each_group_of_the_shape_and_dtype(dtype: str) -> None:
    config = KvCacheConfig.of(cache_shape=(3, 2, 24), block_size=8, cache_dtype=dtype, num_allocation_groups=2)
    kv = KvGroups(config, 5)
    assert len(kv.caches) == 2
    assert len({cache.pool.data_ptr() for cache in kv.caches}) == 2
    for group in range(2):
        keys = kv.layer(2, group).keys
        assert (keys.shape, keys.dtype) == ((5, 2, 8, 24), ELEMENTS[dtype])
        assert kv.caches[group].layout.dtype == dtype
        with pytest.raises(IndexError):
            kv.layer(3, group)
    assert (kv.block_tokens, kv.free_blocks) == (8, [4, 4])


def test_groups_give_blocks_that_do_not_know_of_each_other() -> None:
    kv = KvGroups(KvCacheConfig(cache_shape=(1, 1, 8), block_size=16, num_allocation_groups=2), 4)
    table, other = list[int](), list[int]()
    kv.extend(table, 17)
    kv.extend(table, 32)  # they are there
    assert (table, kv.free_blocks) == ([1, 2], [1, 3])
    kv.extend(other, 48, group=1)
    assert (other, kv.free_blocks) == ([1, 2, 3], [1, 0])
    kv.free(other, group=1)
    assert (other, kv.free_blocks) == ([], [1, 3])


def test_what_cannot_be_had_changes_nothing() -> None:
    kv = KvGroups(KvCacheConfig(cache_shape=(1, 1, 8), block_size=16, max_blocks_per_allocation_group=3), 4)
    table, other = list[int](), list[int]()
    kv.extend(table, 33)
    with pytest.raises(ValueError, match="max_blocks_per_allocation_group: 49 tokens take 4 blocks, and"):
        kv.extend(table, 49)
    with pytest.raises(OutOfBlocks):
        kv.extend(other, 1)
    assert (table, other, kv.free_blocks) == ([1, 2, 3], [], [0])
    kv.free(table)
    taken = [1]
    with pytest.raises(ValueError, match="block 1 is free"):
        kv.free(taken)
    assert (taken, kv.free_blocks) == ([1], [3])


def test_what_no_cache_is_is_refused_by_name() -> None:
    local, dense = KvCacheConfig(type="local", cache_shape=(1, 1, 8)), KvCacheConfig(cache_shape=(1, 1, 8))
    for config, window in ((local, None), (local, 0), (dense, 4)):
        with pytest.raises(ValueError, match=f"window: {window}, and type is {config.type}"):
            KvGroups(config, 4, window=window)
    with pytest.raises(ValueError, match="type: dense, and a coming token sees every block"):
        KvGroups(dense, 4).forget([1], 9)
    with pytest.raises(ValueError, match="cache_shape: a head of 12 elements, which is no multiple of 8"):
        KvGroups(KvCacheConfig(cache_shape=(1, 1, 12)), 4)


@pytest.mark.parametrize("window", [1, 7, 8, 9, 17])
def test_a_local_cache_keeps_what_a_window_sees(window: int) -> None:
    """The same bits as with every block, in a pool that never has more of them than a window and a chunk take. What is
    given back is NaN from then on, and so is the null block."""
    torch.manual_seed(window)
    attend = SelfAttention(
        SelfAttentionConfig.of(
            max_tokens=8,
            n_heads_q=2,
            n_heads_kv=1,
            head_size=16,
            max_sequences=1,
            input_dtype="float32",
            output_dtype="float32",
            masking_type="local",
            masking_args={"window": window},
        )
    )
    shape, most = KvCacheConfig(cache_shape=(1, 1, 16), block_size=8, cache_dtype="float32"), -(-window // 8) + 2
    config = KvCacheConfig(**shape.given(), type="local", max_blocks_per_allocation_group=most)
    dense, local = KvGroups(shape, 16), KvGroups(config, most + 1, window=window)
    whole, table = list[int](), list[int]()
    local.caches[0].block(NULL_BLOCK).fill_(0xFF)
    position = 0
    for count in (3, 8, 1, 1, 5, 8, 8, 1, 7, 8, 1):
        qkv = torch.randn(count, 4 * 16)
        before = set(table)
        local.forget(table, position)
        for block in before - set(table):
            local.caches[0].block(block).fill_(0xFF)
        answers = []
        for kv, blocks in ((dense, whole), (local, table)):
            kv.extend(blocks, position + count)
            batch = build_batch([BatchEntry([0] * count, position, blocks)], 8)
            answers.append(attend(qkv, kv.layer(0), batch).clone())
        assert answers[0].isfinite().all()
        assert torch.equal(*answers)
        position += count
    assert table.count(NULL_BLOCK) >= (position - window - 8) // 8 > 0
    local.free(table)
    assert local.free_blocks == [local.caches[0].num_blocks - 1]
