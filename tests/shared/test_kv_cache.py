"""The pool's bytes, and the layout record."""

from dataclasses import fields, replace

import pytest
import torch

from kernels.kv_format import GREATEST
from shared.kv_cache import KvCache, KvLayout
from shared.transport.pool_memory import PoolMemory

LAYOUT = KvLayout("d" * 64, "float32", num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=4)


def test_block_is_one_range_of_bytes_with_its_layers_keys_and_values() -> None:
    cache = KvCache(LAYOUT, 5)
    assert cache.pool.shape == (5, LAYOUT.block_bytes)
    assert cache.block_bytes == LAYOUT.block_bytes == 3 * 2 * 2 * 4 * 8 * 4
    keys, values = cache.layer(1).keys, cache.layer(1).values
    assert keys.shape == values.shape == (5, 2, 4, 8)
    keys[4], values[4] = 1.0, 2.0
    block = cache.block(4)
    assert (block.dtype, block.shape, block.is_contiguous()) == (torch.uint8, (LAYOUT.block_bytes,), True)
    assert block.data_ptr() == cache.pool.data_ptr() + 4 * LAYOUT.block_bytes
    seen = block.view(torch.float32).view(3, 2, 2, 4, 8)
    assert seen[1, 0].eq(1).all()
    assert seen[1, 1].eq(2).all()
    assert not seen[0].any()
    assert not seen[2].any()
    assert not cache.pool[:4].any()
    with pytest.raises(IndexError):
        cache.block(5)


@pytest.mark.parametrize("dtype", GREATEST)
def test_a_quantized_layer_has_its_scales(dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    cache = KvCache(layout, 5)
    assert cache.block_bytes == layout.block_bytes == 3 * 2 * 2 * 4 * (8 + 4)
    planes = cache.layer(1)
    assert planes.form == dtype
    assert planes.key_scales is not None
    assert planes.value_scales is not None
    assert planes.keys.shape == planes.values.shape == (5, 2, 4, 8)
    assert planes.key_scales.shape == planes.value_scales.shape == (5, 2, 4)
    planes.values[4], planes.value_scales[4] = 7, 0.5
    elements, scales = layout.format.elements(cache.block(4)), layout.format.scales(cache.block(4))
    assert scales is not None
    assert elements[0, 1, 1].eq(7).all()
    assert scales[0, 1, 1].eq(0.5).all()
    assert (elements.count_nonzero(), scales.count_nonzero()) == (2 * 4 * 8, 2 * 4)
    assert not cache.pool[:4].any()


def test_a_dtype_that_no_cache_has_is_refused() -> None:
    with pytest.raises(ValueError, match="'float64' is none of float32, bfloat16, float16, int8, fp8"):
        replace(LAYOUT, dtype="float64")


def test_blocks_copied_byte_by_byte_between_pools() -> None:
    source, target = KvCache(LAYOUT, 3), KvCache(LAYOUT, 4)
    source.pool.random_()
    target.block(3).copy_(source.block(1))
    assert torch.equal(target.pool[3], source.pool[1])
    assert not target.pool[:3].any()


def test_pool_in_shared_memory() -> None:
    layout = replace(LAYOUT, dtype="bfloat16")
    memory = PoolMemory(6 * layout.block_bytes)
    cache = KvCache(layout, 6, memory=memory.tensor)
    assert cache.layer(2).keys.dtype == torch.bfloat16
    cache.layer(2).keys[5] = 3.0
    assert memory.buffer[-layout.block_bytes :] == bytes(cache.block(5).numpy())
    assert any(memory.buffer[-layout.block_bytes :])
    with pytest.raises(ValueError, match=f"7 blocks of {layout.block_bytes} bytes cannot lie in {memory.num_bytes} b"):
        KvCache(layout, 7, memory=memory.tensor)
    memory.close()


def test_every_field_is_in_the_digest_and_the_difference() -> None:
    other_values = {"model_digest": "e" * 64, "dtype": "bfloat16", "order": "layer,block,kv,head,token,dim"}
    for field in fields(KvLayout):
        value = getattr(LAYOUT, field.name)
        other = replace(LAYOUT, **{field.name: other_values.get(field.name) or value + 1})
        assert other.digest != LAYOUT.digest
        assert LAYOUT.difference(other) == [field.name]
    assert LAYOUT.difference(replace(LAYOUT)) == []
    assert replace(LAYOUT).digest == LAYOUT.digest


def test_digest_does_not_change_by_accident() -> None:
    """Workers of two versions compare it: a change here needs a new CONTRACT_VERSION."""
    assert LAYOUT.digest == "02b487fa128ebd3052e588b1aa8444860f7a430374fd808ab237aa6f135db24d"
