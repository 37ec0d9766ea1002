"""A sequence out of any pool: what is copied, what fits where, and heads of several ranks put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.kv_format import ELEMENTS
from shared.kv_cache import KvCache, KvLayout
from shared.sequence_state import SequenceState
from shared.swap_space import SwapSpace

LAYOUT = KvLayout("digest", "float32", num_layers=2, num_kv_heads=4, head_dim=8, block_tokens=8)


def filled(layout: KvLayout, num_blocks: int = 7, seed: int = 0) -> KvCache:
    kv = KvCache(layout, num_blocks)
    elements = layout.format.elements(kv.pool)
    values = torch.randn(elements.shape, generator=torch.Generator().manual_seed(seed))
    elements.copy_((values * 50).to(ELEMENTS[layout.dtype]))
    if (scales := layout.format.scales(kv.pool)) is not None:
        scales.fill_(0.25)
    return kv


def rows(kv: KvCache, blocks: list[int], num_tokens: int, heads: slice = slice(None)) -> torch.Tensor:
    """[layers, 2, heads, tokens, head_dim]"""
    elements = kv.layout.format.elements(kv.pool)[torch.tensor(blocks)]
    return elements.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, heads, :num_tokens]


def test_a_copy_has_the_blocks_of_the_tokens_alone_and_stays_what_it_was():
    kv = filled(LAYOUT)
    state = SequenceState.take(kv, [5, 2, 6], 11)
    assert state.num_bytes == 2 * LAYOUT.block_bytes
    expected = kv.pool[torch.tensor([5, 2])].clone()
    kv.pool.zero_()
    assert torch.equal(state.blocks, expected)
    state.put(kv, [1, 3, 4])
    assert torch.equal(kv.pool[torch.tensor([1, 3])], expected)
    assert not kv.pool[torch.tensor([0, 2, 4, 5, 6])].any()


def test_a_sequence_without_tokens_has_no_blocks():
    state = SequenceState.take(filled(LAYOUT), [], 0)
    assert (state.num_bytes, state.num_blocks(8)) == (0, 0)
    state.put(filled(LAYOUT), [])


@pytest.mark.parametrize("block_tokens", [4, 8, 16])
@pytest.mark.parametrize("heads", [range(4), range(1, 3), range(3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_goes_into_blocks_of_another_size_and_fewer_heads(block_tokens: int, heads: range, dtype: str):
    source = filled(replace(LAYOUT, dtype=dtype))
    layout = replace(source.layout, block_tokens=block_tokens, first_kv_head=heads.start, num_kv_heads=len(heads))
    state = SequenceState.take(source, [3, 1], 13)
    state.check_fits(layout)
    target = KvCache(layout, 8)
    blocks = [6, 2, 7, 1][: state.num_blocks(block_tokens)]
    state.put(target, blocks)
    expected = rows(source, [3, 1], 13, slice(heads.start, heads.stop))
    assert torch.equal(rows(target, blocks, 13), expected)
    untouched = [block for block in range(8) if block not in blocks]
    assert not target.pool[torch.tensor(untouched)].any()


@pytest.mark.parametrize("shares", [[range(4)], [range(2), range(2, 4)], [range(1), range(1, 4)]])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_the_states_of_ranks_join_to_what_one_would_have(shares: list[range], dtype: str):
    whole = filled(replace(LAYOUT, dtype=dtype))
    states = [own_state(whole, heads) for heads in shares]
    joined = SequenceState.joined([*reversed(states), states[-1]])  # ranks that share heads hold the same
    assert joined.layout == whole.layout
    assert torch.equal(joined.blocks, SequenceState.take(whole, [3, 1], 13).blocks)


def own_state(whole: KvCache, heads: range) -> SequenceState:
    planes = whole.pool.view(
        -1, whole.layout.num_layers * 2, whole.layout.num_kv_heads, whole.layout.format.plane_bytes
    )
    layout = replace(whole.layout, first_kv_head=heads.start, num_kv_heads=len(heads))
    kv = KvCache(layout, whole.num_blocks, memory=planes[:, :, heads.start : heads.stop].flatten())
    return SequenceState.take(kv, [3, 1], 13)


def test_states_that_are_not_of_one_sequence_do_not_join():
    whole = filled(LAYOUT)
    first, second, last = (own_state(whole, heads) for heads in (range(1), range(1, 2), range(3, 4)))
    with pytest.raises(ValueError, match="num_kv_heads: none of the states has head 2"):
        SequenceState.joined([first, second, last])
    shorter = SequenceState(second.layout, second.blocks, 12)
    with pytest.raises(ValueError, match="they differ in num_tokens"):
        SequenceState.joined([first, shorter])
    other = SequenceState(replace(second.layout, model_digest="other"), second.blocks, 13)
    with pytest.raises(ValueError, match="they differ in model_digest"):
        SequenceState.joined([first, other])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (replace(LAYOUT, model_digest="other"), "model_digest: 'digest' where the sequence comes from, 'other' here"),
        (replace(LAYOUT, head_dim=16), "head_dim: 8 where the sequence comes from, 16 here"),
        (replace(LAYOUT, dtype="int8"), "dtype: keys and values are float32 where .* int8 here; set convert_dtype"),
        (replace(LAYOUT, first_kv_head=1), "num_kv_heads: heads 1 to 4 are wanted here, and the sequence has 0 to 3"),
        (replace(LAYOUT, num_kv_heads=5), "num_kv_heads: heads 0 to 4 are wanted here, .*; join the states of all"),
    ],
)
def test_what_does_not_fit_is_named(layout: KvLayout, message: str):
    state = SequenceState.take(filled(LAYOUT), [3], 5)
    with pytest.raises(ValueError, match=message):
        state.check_fits(layout)
    state.check_fits(LAYOUT)
    state.check_fits(replace(LAYOUT, dtype="int8"), convert_dtype=True)


@pytest.mark.parametrize("blocks", [torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, LAYOUT.block_bytes)])
def test_blocks_that_hold_no_such_tokens_are_refused(blocks: torch.Tensor):
    with pytest.raises(ValueError, match="5 tokens of this layout are uint8"):
        SequenceState(LAYOUT, blocks, 5)


def test_a_swap_space_has_room_for_so_many_bytes():
    kv = filled(LAYOUT)
    swap = SwapSpace([kv], 3 * LAYOUT.block_bytes)
    before = kv.pool.clone()
    one = swap.save([1, 2], 9)
    assert one is not None
    assert swap.save([3, 4], 9) is None
    other = swap.save([5], 8)
    assert other is not None
    assert swap.used_bytes == 3 * LAYOUT.block_bytes
    swap.restore(one, [3, 4])
    swap.drop(other)
    assert swap.used_bytes == 0
    assert torch.equal(kv.pool[3:5], before[1:3])
    unlimited = SwapSpace([kv], None)
    assert unlimited.save([1, 2, 3, 4, 5, 6], 48)


@pytest.mark.parametrize("block_tokens", [8, 16])
def test_triton_takes_and_puts_the_same_bytes(interpreter: None, block_tokens: int):
    source = filled(replace(LAYOUT, dtype="bfloat16"))
    state = SequenceState.take(source, [3, 1], 13)
    assert torch.equal(state.blocks, source.pool[torch.tensor([3, 1])])
    target = KvCache(replace(source.layout, block_tokens=block_tokens), 4)
    state.put(target, [2, 3][: state.num_blocks(block_tokens)])
    assert torch.equal(rows(target, [2, 3][: state.num_blocks(block_tokens)], 13), rows(source, [3, 1], 13))
