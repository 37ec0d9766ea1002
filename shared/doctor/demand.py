"""What the configuration takes of a host, as far as it can be told without reading the weights: at least so much."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shared.config import TandemConfig
from shared.model_files import ModelError
from shared.model_source import folder_bytes
from shared.model_store import ModelStore
from shared.policies.table import embeds

MIB = 1 << 20
# of each rank of a worker before its pool and its weights: Python, torch and the ops
_WORKER_BYTES = 200 * MIB
# of a process, beside its ops' threads: gRPC, asyncio's executor, copies
_PROCESS_THREADS = 48
# of a rank that is not the worker's own process: what exchanges activations
_RANK_THREADS = 8
FEW_FILES = 4096


@dataclass(frozen=True)
class Demand:
    """Bytes of host memory: of the weights, which the workers of a host share, and of one worker of each role, with all
    its ranks."""

    weights_bytes: int  # 0 where the model is not here or its weights go to the GPU
    prefill_bytes: int
    decode_bytes: int
    num_prefill: int
    num_decode: int
    threads: int  # and processes, of all roles together
    files: int  # open descriptors of the process that has most

    @classmethod
    def of(cls, config: TandemConfig) -> Demand:
        """A pool that is given in blocks counts as nothing: what a block takes depends on the model."""
        vectors = _embeds(config)
        prefill, decode, num_decode = config.prefill, config.decode, 0 if vectors else config.up.decode
        workers = config.up.prefill + num_decode
        prefill_ranks, decode_ranks = config.tp_of(prefill), config.tp_of(decode)
        others = config.up.prefill * (prefill_ranks - 1) + num_decode * (decode_ranks - 1)
        # ranks of another number have other slices of the weights
        running = ((config.up.prefill, prefill_ranks), (num_decode, decode_ranks))
        copies = len({ranks for count, ranks in running if count})
        ops = config.threads or len(os.sched_getaffinity(0))
        return cls(
            weights_bytes=0 if config.device == "cuda" else copies * _weights_bytes(config.model),
            prefill_bytes=_WORKER_BYTES * prefill_ranks
            + (0 if vectors or prefill.num_blocks else prefill.kv_memory_mib * MIB),
            decode_bytes=_WORKER_BYTES * decode_ranks
            + (0 if decode.num_blocks else decode.kv_memory_mib * MIB)
            + decode.swap_memory_mib * MIB * (decode.preemption == "swap"),
            num_prefill=config.up.prefill,
            num_decode=num_decode,
            threads=workers * (ops + _PROCESS_THREADS) + others * _RANK_THREADS + _PROCESS_THREADS,
            # a client may hold a connection for each request, and a worker one to each of its peers
            files=max(FEW_FILES, 2 * (config.gateway.max_running + config.gateway.max_queued)),
        )

    @property
    def smallest_bytes(self) -> int:
        """One worker, of the role that takes less."""
        roles = ((self.num_prefill, self.prefill_bytes), (self.num_decode, self.decode_bytes))
        return self.weights_bytes + min((num_bytes for count, num_bytes in roles if count), default=self.prefill_bytes)

    @property
    def total_bytes(self) -> int:
        """Everything that `tandem up` starts."""
        return self.weights_bytes + self.num_prefill * self.prefill_bytes + self.num_decode * self.decode_bytes


def mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"


def _embeds(config: TandemConfig) -> bool:
    """Whether the model, if it is here, makes vectors: it has no pool, and no decode workers."""
    try:
        return embeds(ModelStore().resolve(config.model, allow_pickle=config.allow_pickle).config)
    except ModelError:
        return False


def _weights_bytes(model: str) -> int:
    try:
        return ModelStore().show(model).num_bytes
    except ModelError:
        path = Path(model).expanduser()
    if path.is_dir():
        return folder_bytes(path)
    return path.stat().st_size if path.is_file() else 0
