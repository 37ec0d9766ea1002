"""The engine below the schedulers: a model, its KV pool, and forwards over ragged batches. It schedules nothing.

plan = EnginePlan.of(config, config.decode, files)        # reads the configuration only
engine = Engine(plan)                                     # loads the weights
logits = engine.forward([BatchEntry(prompt, 0, blocks), BatchEntry([token], 17, other_blocks)])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.device import in_triton
from kernels.dtypes import DTYPES
from kernels.sampling import How, draw
from shared.batch import NULL_BLOCK, BatchEntry, RaggedBatch, build_batch
from shared.checkpoint import open_checkpoint
from shared.engine.plan import EnginePlan
from shared.graphs import EagerRunner, GraphRunner, Launch, ReplayRunner
from shared.kv_cache import KvCache
from shared.models.decoder import Decoder
from shared.models.expert_ranks import ExpertRanks
from shared.models.loading import load_weights, packing_of
from shared.models.ranks import Ranks
from shared.models.weights import ModelWeights
from shared.packed_weights import MIN_BYTES, share_packed
from shared.parallel.expert_groups import ExpertGroups
from shared.parallel.experts import ExpertPartition, expert_shard_of
from shared.parallel.group import Group
from shared.parallel.partition import Partition
from shared.penalties import SampleRow
from shared.workspace import Workspace

# Prompts that between them take every tile of kernels/cuda/linear.py, ranges side by side and in turn.
_CUDA_LENGTHS = (16, 64, 128, 512, 1024, 4096)


class Memory(Protocol):
    """What a pool lies in: shared/transport/pool_memory.py, or device_pool.py there."""

    @property
    def tensor(self) -> Tensor:
        """uint8 [num_bytes], zeros at first."""
        ...

    def mark(self) -> int: ...


class Engine:
    """A loaded model and its pool. One thread at a time; `forward` writes only to the blocks that its entries name."""

    def __init__(
        self,
        plan: EnginePlan,
        memory: Memory | None = None,
        *,
        weights: ModelWeights | None = None,
        group: Group | None = None,
        expert_groups: ExpertGroups | None = None,
    ) -> None:
        """memory: where the pool lies, on the plan's device; default: memory of its own.

        weights: on the plan's device, of the plan's shard; default: those of the plan's files. group: of a plan with a
        shard, the ranks that compute the model. Every rank makes the same calls of `warm_up`, `forward`, `step` and
        `grow`, with entries that are equal, and gets the same logits; each has its own key-value heads in its pool.
        expert_groups: of a plan with an expert_shard, likewise; default: the ranks of `group` share each expert.
        Raises CheckpointError, and ValueError for a group that is not the shard's.
        """
        self.plan = plan
        ranks, expert_ranks = _ranks_of(plan, group), _expert_ranks_of(plan, expert_groups, group)
        self._is_alone = ranks is None and expert_ranks is None
        self.use_thread()
        tensor = None if memory is None else memory.tensor
        self.kv = KvCache(plan.layout, plan.num_blocks, memory=tensor, device=plan.device)
        self._memory = memory
        self._decoder = Decoder(
            plan.architecture,
            weights or load_plan(plan),
            deterministic=plan.deterministic,
            ranks=ranks,
            expert_ranks=expert_ranks,
        )
        self._is_observed = False
        self._in_triton = in_triton("the engine", self.kv.pool)
        self._runner = self._make_runner()
        # begins a step before the one before has ended; None on a CPU, whose cores have the step to compute
        self.launch: Launch | None = getattr(self._runner, "launch", None)

    @property
    def caches(self) -> tuple[KvCache, ...]:
        """The pools in which a block that schedulers give away is a block: this one's, and those of other ranks that
        only this process copies blocks of."""
        return (self.kv,)

    def use_thread(self) -> None:
        """Called once on each thread that runs forwards: torch counts threads for each thread that calls it."""
        torch.set_num_threads(self.plan.num_threads)

    def warm_up(self) -> None:
        """Runs a forward of each kind, and captures what the runner replays: no request waits for a compiler."""
        if not self._in_triton:
            self._decoder.reserve(self.plan.batch_tokens, self.kv)
        self._runner.capture()
        block_tokens = self.plan.layout.block_tokens
        lengths = _CUDA_LENGTHS if self.plan.device == "cuda" else (block_tokens,)
        for length in sorted({min(length, self.plan.max_context) for length in lengths}):
            # the null block takes what warming up writes
            table = [NULL_BLOCK] * -(-length // block_tokens)
            logits = self._run(build_batch([BatchEntry([0] * length, 0, table)], block_tokens))
            draw(logits, [How(1.0)], [0.5])

    def forward(self, entries: Sequence[BatchEntry]) -> Tensor:
        """Computes the entries' tokens; float32 logits [wanted, vocab], in the order of entries and their tokens.

        The next forward may overwrite them.
        """
        if (
            len(entries) <= self._runner.max_sequences
            and not self._is_observed
            and all(len(entry.token_ids) == 1 and entry.wants != "none" for entry in entries)
        ):
            return self._runner.run(entries)
        return self._run(build_batch(entries, self.plan.layout.block_tokens))

    def step(self, entries: Sequence[BatchEntry], rows: Sequence[SampleRow]) -> tuple[list[int | None], Tensor]:
        """A forward of one token of each sequence, and the tokens that the device has drawn; see GraphRunner.step."""
        if len(entries) <= self._runner.max_sequences:
            return self._runner.step(entries, rows)
        return [None] * len(rows), self.forward(entries)

    def observe_layers(self, after_layer: Callable[[int], None] | None) -> None:
        """Has it called after each layer of a `forward`, with its index, and with -1 before the first; None: no more.

        Forwards then run op by op.
        """
        self._is_observed = after_layer is not None
        self._decoder.observe_layers(after_layer)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies blocks within the pool, in order. Each block is one contiguous range."""
        for kv in self.caches:
            for source, target in zip(sources, targets, strict=True):
                kv.pool[target].copy_(kv.pool[source])

    def grow(self, num_blocks: int) -> None:
        """Moves to a pool of its own with more blocks, which keep their numbers and what they hold."""
        before = self.kv
        self.kv = KvCache(self.plan.layout, num_blocks, device=self.plan.device)
        self.kv.pool[: before.num_blocks].copy_(before.pool)
        self.plan = replace(self.plan, num_blocks=num_blocks)
        # captured steps name the old one
        self._runner = self._make_runner()
        self.launch = getattr(self._runner, "launch", None)
        before.close()
        self._memory = None

    def mark(self) -> int:
        """Marks this moment in what the device was told to compute, for those who read or write the pool beside it.

        0 where all of it is done already.
        """
        return 0 if self._memory is None else self._memory.mark()

    @property
    def workspace_bytes(self) -> int:
        """Of the activations of prompts, which all layers share; captured steps have their own."""
        return self._decoder.workspace_bytes

    @property
    def description(self) -> str:
        """What it computes with, for logs."""
        if self.plan.device == "cuda":
            return f"Triton on {torch.cuda.get_device_name()}"
        return "Triton's interpreter" if self._in_triton else library.instruction_set()

    def close(self) -> None:
        """Lets go of the weights and the pool; no forward can follow."""
        del self._runner, self.launch
        self._decoder.close()
        self.kv.close()
        self._memory = None

    def _ring(self) -> None:
        """Now that the device computes, whoever waits for what the last step brought may have Python's lock.

        C ops see to that themselves (kernels/cpu/team.c).
        """
        if self._in_triton:
            library.call("tandem_ring_later", -1)

    def _make_runner(self) -> GraphRunner:
        plan, block_tokens = self.plan, self.plan.layout.block_tokens
        if not self._is_alone:
            return EagerRunner(self._run, max_sequences=plan.max_running, block_tokens=block_tokens)
        table_width = -(-plan.max_context // block_tokens)
        if not self._in_triton:
            return ReplayRunner(
                self._run, max_sequences=plan.max_running, block_tokens=block_tokens, table_width=table_width
            )
        from shared.cuda_graphs import CudaRunner

        return CudaRunner(
            self._run,
            device=plan.device,
            max_sequences=plan.max_running,
            block_tokens=block_tokens,
            table_width=table_width,
            vocab_size=plan.architecture.vocab_size,
            replays=plan.enable_cuda_graph,
            launched=self._ring,
        )

    def _run(self, batch: RaggedBatch, workspace: Workspace | None = None) -> Tensor:
        logits = self._decoder.forward(batch.to(self.plan.device), self.kv, workspace)
        self._ring()
        return logits


def _ranks_of(plan: EnginePlan, group: Group | None) -> Ranks | None:
    if plan.shard is None or group is None:
        if plan.shard is not None or (group is not None and group.size > 1):
            raise ValueError("group: a plan with a shard has one, and a plan without has none")
        return None
    return Ranks(group, Partition(plan.architecture, plan.shard))


def _expert_ranks_of(plan: EnginePlan, groups: ExpertGroups | None, group: Group | None) -> ExpertRanks | None:
    shard = plan.expert_shard or expert_shard_of(plan.architecture, plan.shard)
    if shard is None:
        if groups is not None:
            raise ValueError("expert_groups: the plan has no expert_shard; leave them out")
        return None
    return ExpertRanks(groups or ExpertGroups(None, group), ExpertPartition(plan.architecture, shard))


def load_plan(plan: EnginePlan) -> ModelWeights:
    """The weights of a plan's files, on a CPU mapped from what the workers of this host share, made on first use.

    Raises CheckpointError.
    """
    dtype = DTYPES[plan.dtype]

    def load() -> ModelWeights:
        checkpoint = open_checkpoint(plan.model_files, allow_pickle=plan.allow_pickle)
        return load_weights(
            plan.architecture,
            checkpoint,
            dtype=dtype,
            device=plan.device,
            quantization=plan.quantization,
            shard=plan.shard,
            expert_shard=plan.expert_shard,
        )

    num_bytes = sum(path.stat().st_size for path in plan.model_files.weights.paths)
    if num_bytes < MIN_BYTES or plan.device != "cpu":
        weights = load()
    else:
        cuts = repr((plan.shard, plan.expert_shard))
        parts = (plan.layout.model_digest, plan.dtype, packing_of(plan.quantization, dtype), cuts)
        tensors = share_packed(parts, lambda: load().tensors())
        weights = ModelWeights.from_tensors(
            plan.architecture, tensors, shard=plan.shard, expert_shard=plan.expert_shard
        )
    weights.probe()
    return weights
