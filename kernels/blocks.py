"""Blocks of a pool by number: gathered to contiguous bytes, scattered from them, copied within the pool.

    gather_blocks:   packed[i] = pool[block_ids[i]]
    scatter_blocks:  pool[block_ids[i]] = packed[i]
    copy_blocks:     pool[targets[i]] = pool[sources[i]]

pool       [blocks, ...], any dtype, each block contiguous (the distance between blocks is free)
block_ids  [n] int32 or int64, contiguous, on the pool's device; sources and targets alike
packed     [n, block_bytes] uint8, contiguous

On CUDA each is one launch, and nobody waits for the values of block_ids: one out of range gathers zeros, and nothing
is scattered or copied to or from it. On a CPU it is an IndexError, with nothing written.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kernels.device import in_triton


def gather_blocks(pool: Tensor, block_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The bytes of blocks -> uint8 [n, block_bytes]. Raises ValueError when a tensor breaks the contract."""
    triton = in_triton("gather_blocks", pool)
    blocks = _bytes_of(pool)
    _check_ids("block_ids", block_ids, pool)
    if out is None:
        out = blocks.new_empty(block_ids.shape[0], blocks.shape[1])
    else:
        _check_packed("out", out, block_ids, blocks)
    if triton:
        from kernels.cuda.blocks import copy_blocks as launch

        launch(blocks, block_ids, out, None)
    else:
        _check_range("block_ids", block_ids, blocks)
        torch.index_select(blocks, 0, block_ids, out=out)
    return out


def scatter_blocks(pool: Tensor, block_ids: Tensor, packed: Tensor) -> None:
    """Writes blocks of bytes into the pool. block_ids must differ. ValueError when a tensor breaks the contract."""
    triton = in_triton("scatter_blocks", pool)
    blocks = _bytes_of(pool)
    _check_ids("block_ids", block_ids, pool)
    _check_packed("packed", packed, block_ids, blocks)
    if triton:
        from kernels.cuda.blocks import copy_blocks as launch

        launch(packed, None, blocks, block_ids)
    else:
        _check_range("block_ids", block_ids, blocks)
        blocks.index_copy_(0, block_ids.long(), packed)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies blocks onto others. targets must differ from one another and from all sources.

    Raises ValueError when a tensor breaks the contract.
    """
    triton = in_triton("copy_blocks", pool)
    blocks = _bytes_of(pool)
    _check_ids("sources", sources, pool)
    _check_ids("targets", targets, pool)
    if sources.shape != targets.shape:
        raise ValueError(f"sources and targets must be as many, got {sources.shape[0]} and {targets.shape[0]}")
    if triton:
        from kernels.cuda.blocks import copy_blocks as launch

        launch(blocks, sources, blocks, targets)
    else:
        _check_range("sources", sources, blocks)
        _check_range("targets", targets, blocks)
        blocks.index_copy_(0, targets.long(), blocks.index_select(0, sources))


def gather_blocks_reference(pool: Tensor, block_ids: Tensor) -> Tensor:
    """The same in plain torch."""
    return pool[block_ids.long()].view(torch.uint8).reshape(block_ids.shape[0], -1)


def scatter_blocks_reference(pool: Tensor, block_ids: Tensor, packed: Tensor) -> None:
    """The same in plain torch."""
    pool[block_ids.long()] = packed.view(pool.dtype).view(-1, *pool.shape[1:])


def copy_blocks_reference(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """The same in plain torch."""
    pool[targets.long()] = pool[sources.long()]


def _bytes_of(pool: Tensor) -> Tensor:
    """A view: uint8 [blocks, block_bytes]."""
    if not (pool.dim() and pool.shape[0] and pool[0].is_contiguous()):
        raise ValueError(f"pool must be [blocks, ...], each block contiguous, got {list(pool.shape)} {pool.stride()}")
    return pool.view(pool.shape[0], prod(pool.shape[1:])).view(torch.uint8)


def _check_ids(name: str, ids: Tensor, pool: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 or int64 [n], got {ids.dtype} {list(ids.shape)}")
    if ids.device != pool.device:
        raise ValueError(f"{name} must be on {pool.device} like pool, got {ids.device}")


def _check_packed(name: str, packed: Tensor, ids: Tensor, blocks: Tensor) -> None:
    shape = (ids.shape[0], blocks.shape[1])
    if packed.dtype != torch.uint8 or packed.shape != shape or not packed.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous torch.uint8 {list(shape)}, got {packed.dtype} {list(packed.shape)}"
        )
    if packed.device != blocks.device:
        raise ValueError(f"{name} must be on {blocks.device} like pool, got {packed.device}")


def _check_range(name: str, ids: Tensor, blocks: Tensor) -> None:
    """Before torch, which would have written some of them when it comes to a wrong one."""
    wrong = ((ids < 0) | (ids >= blocks.shape[0])).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise IndexError(f"{name}[{index}] is {int(ids[index])}, and the pool has {blocks.shape[0]} blocks")
