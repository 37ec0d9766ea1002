"""How many blocks the ragged engine's KV cache has: what `memory_config` says of the memory that there is."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from shared.config import StateManagerConfig
from shared.doctor.cgroup import Cgroup
from shared.kv_cache import KvLayout


def num_blocks(layout: KvLayout, limits: StateManagerConfig, max_context: int, free_bytes: int) -> int:
    """The null block included. free_bytes: on the device, once the weights are there.

    No more than the limits let sequences hold. Raises ValueError where there is no memory for a single block.
    """
    memory = limits.memory_config
    most = limits.max_tracked_sequences * -(-max_context // layout.block_tokens)
    affordable = (free_bytes - memory.size) // layout.block_bytes - 1
    if memory.mode == "allocate":
        most, affordable = memory.size, free_bytes // layout.block_bytes - 1
    if affordable < (most if memory.mode == "allocate" else 1):
        raise ValueError(
            f"Insufficient memory to allocate KV-caches: {free_bytes} bytes are free, a block takes "
            f"{layout.block_bytes}, and memory_config asks to {memory.mode} {memory.size} "
            f"{'blocks' if memory.mode == 'allocate' else 'bytes that stay free'}"
        )
    return min(most, affordable) + 1


def free_memory(device: str) -> int:
    """Bytes that a process can still have: on a CPU what neither the host nor a container's limit denies."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = psutil.virtual_memory().available
    limit = Cgroup(Path("/proc"), Path("/sys/fs/cgroup")).memory_bytes
    return available if limit is None else min(available, limit - psutil.Process().memory_info().rss)
