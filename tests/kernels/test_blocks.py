"""Gathered, scattered and copied blocks against indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.blocks import (
    copy_blocks,
    copy_blocks_reference,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)

TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
IDS = pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
POOLS = pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (9, 2, 2, 3, 16, 8)),
        (torch.float32, (4, 5)),
        (torch.float32, (5, 2049)),
        (torch.bfloat16, (7, 3, 5)),  # 30 bytes, which are no words
        (torch.int8, (6, 2051)),
        (torch.int64, (3,)),
        (torch.bool, (8, 4)),
    ],
    ids=str,
)


def make_pool(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(device, dtype)


@POOLS
@IDS
def test_they_match_the_reference(on: str, dtype: torch.dtype, shape: tuple[int, ...], ids_dtype: torch.dtype) -> None:
    torch.manual_seed(len(shape))
    pool, other = make_pool(shape, dtype, on), make_pool(shape, dtype, on)
    ids = torch.randperm(shape[0])[: shape[0] - 1].to(on, ids_dtype)
    twice = torch.cat([ids, ids[:1]])  # what is read may be read twice
    packed = gather_blocks(pool, twice)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, gather_blocks_reference(pool, twice))
    out = torch.full_like(packed, 77)
    assert gather_blocks(pool, twice, out=out) is out
    assert torch.equal(out, packed)

    expected = other.clone()
    scatter_blocks_reference(expected, ids, packed[:-1])
    scatter_blocks(other, ids, packed[:-1])
    assert torch.equal(other, expected)

    half = (shape[0] + 1) // 2
    sources, targets = torch.randperm(shape[0]).to(on, ids_dtype).split([half, shape[0] - half])
    sources = sources[: len(targets)]
    copy_blocks_reference(expected, sources, targets)
    copy_blocks(other, sources, targets)
    assert torch.equal(other, expected)


@pytest.mark.parametrize("gap", [16, 7])
def test_blocks_may_lie_apart(on: str, gap: int) -> None:
    whole = torch.randint(0, 100, (6, 40 + gap), dtype=torch.uint8).to(on)
    pool, before = whole[:, gap:].unflatten(1, (5, 8)), whole.clone()
    ids = torch.tensor([4, 0, 5], device=on)
    packed = gather_blocks(pool, ids)
    assert torch.equal(packed, before[ids, gap:])
    scatter_blocks(pool, ids, packed + 100)
    copy_blocks(pool, ids[:2], torch.tensor([1, 2], device=on))
    assert torch.equal(whole[:, :gap], before[:, :gap]), "what lies between is left alone"
    assert torch.equal(whole[[4, 0, 5, 1, 2], gap:], before[[4, 0, 5, 4, 0], gap:] + 100)
    assert torch.equal(whole[3], before[3])


def test_no_blocks_are_no_work(on: str) -> None:
    pool, none = torch.ones(3, 8, device=on), torch.empty(0, dtype=torch.int64, device=on)
    packed = gather_blocks(pool, none)
    assert packed.shape == (0, 32)
    scatter_blocks(pool, none, packed)
    copy_blocks(pool, none, none)
    assert pool.all()


@TRITON
@IDS
def test_triton_leaves_a_block_out_of_range_out(on: str, ids_dtype: torch.dtype) -> None:
    pool = torch.randint(1, 100, (5, 2060), dtype=torch.int32).to(on)
    ids = torch.tensor([1, 5, -1, 2**31 - 1, 4]).to(on, ids_dtype)
    packed = gather_blocks(pool, ids, out=torch.full((5, 8240), 77, dtype=torch.uint8, device=on))
    assert torch.equal(packed[[0, 4]], gather_blocks_reference(pool, ids[[0, 4]]))
    assert not packed[1:4].any()

    written, blocks = torch.zeros_like(pool), packed + 1
    scatter_blocks(written, ids, blocks)
    assert torch.equal(gather_blocks_reference(written, ids[[0, 4]]), blocks[[0, 4]])
    assert not written[[0, 2, 3]].any()

    before = pool.clone()
    copy_blocks(pool, torch.tensor([5, 0, 1, -1]).to(on, ids_dtype), torch.tensor([2, -1, 3, 4]).to(on, ids_dtype))
    assert torch.equal(pool, before[[0, 1, 2, 1, 4]])


def test_broken_contracts_are_refused() -> None:
    pool, ids = torch.zeros(4, 2, 3), torch.tensor([0, 2])
    packed = torch.ones(2, 24, dtype=torch.uint8)
    for refused in (pool.transpose(1, 2), pool[:0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"pool must be \[blocks, \.\.\.\]"):
            gather_blocks(refused, ids)
    for wrong in (ids.short(), ids[None], torch.arange(4)[::2]):
        with pytest.raises(ValueError, match="block_ids must be contiguous int32 or int64"):
            gather_blocks(pool, wrong)
    with pytest.raises(ValueError, match="block_ids must be on cpu"):
        gather_blocks(pool, ids.to("meta"))
    with pytest.raises(ValueError, match="out must be"):
        gather_blocks(pool, ids, out=packed[:1])
    with pytest.raises(ValueError, match="packed must be"):
        scatter_blocks(pool, ids, packed.int())
    with pytest.raises(ValueError, match="packed must be on cpu"):
        scatter_blocks(pool, ids, packed.to("meta"))
    with pytest.raises(ValueError, match="sources and targets must be as many, got 2 and 1"):
        copy_blocks(pool, ids, ids[:1])
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        gather_blocks(pool.to("meta"), ids)
    for number in (4, -1):
        wrong = torch.tensor([0, number])
        with pytest.raises(IndexError, match=rf"block_ids\[1\] is {number}, and the pool has 4 blocks"):
            gather_blocks(pool, wrong)
        with pytest.raises(IndexError, match=r"block_ids\[1\]"):
            scatter_blocks(pool, wrong, packed)
        with pytest.raises(IndexError, match=r"targets\[1\]"):
            copy_blocks(pool, ids, wrong)
        with pytest.raises(IndexError, match=r"sources\[1\]"):
            copy_blocks(pool, wrong, ids)
    assert not pool.any()
