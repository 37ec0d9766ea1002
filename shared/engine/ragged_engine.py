"""The ragged engine by DeepSpeed's interface (FastGen's InferenceEngineV2): sequences by uid, put token by token.

    engine = RaggedEngine("model/", {"state_manager": {"max_context": 2048}})
    logits = engine.put([7, 8], [prompt, other_prompt])     # [2, vocab], of each sequence's last token
    logits = engine.put([7], [[int(logits[0].argmax())]])
    state = engine.export_sequence(7)                       # on to another engine, by its import_sequence
    engine.flush(7)

It runs what the workers run: the Engine, its pool, its ops. What to put when is the caller's, or split_fuse.py's.

With tp_size above 1 each of so many ranks of torch.distributed has an engine and makes the same calls, in the same
order and with the same arguments. What they return is the same on all, and the same bits as of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.dtypes import DTYPES
from shared.config import RaggedEngineConfig, TensorParallelConfig
from shared.config.dtype import dtype_name
from shared.engine.engine import Engine
from shared.engine.plan import EnginePlan
from shared.engine.ragged_batch import RaggedEntries, checked_tokens
from shared.engine.ragged_memory import free_memory, num_blocks
from shared.engine.ragged_model import RaggedModel
from shared.engine.ragged_sequences import RaggedSequences, TrackedSequence
from shared.engine.ranks import group_of, least
from shared.engine.scheduling_result import SchedulingError, SchedulingResult
from shared.kv_cache import KvLayout
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights
from shared.parallel.group import Group
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard, head_shares
from shared.sequence_state import SequenceState
from shared.swap_space import SwapSpace

_REPLAYED = 64  # sequences of a captured step at most


class RaggedEngine:
    """A model and the sequences that are in its cache. One thread at a time.

    Whatever raises has changed nothing: not which sequences are tracked, nor their tokens and blocks.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        config: Any = None,
        *,
        dtype: Any = None,
        kv_dtype: str | None = None,
        block_tokens: int = 16,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """model: a model of transformers in memory, a folder, a name of the store, a GGUF file, or what `serialize`
        wrote. config: None, a dict, the path of a JSON file or a RaggedEngineConfig; kwargs: its fields.

        dtype: float32, bfloat16 or float16; default: the model's own, float16 with wf6af16. kv_dtype: what keys and
        values are kept as, int8 and fp8 too; default: dtype. block_tokens: in a KV block, a power of two. device: cpu
        or cuda; default: cuda where there is one. Raises ValueError for options that cannot be, "Unsupported model
        type …" and "Insufficient memory to allocate KV-caches …"; ModelError, CheckpointError for files.
        """
        self.config = RaggedEngineConfig.of(config, **kwargs)
        limits = self._limits = self.config.state_manager
        if block_tokens < 1 or block_tokens & (block_tokens - 1):
            raise ValueError(f"block_tokens: {block_tokens} is not a power of two; use 16, 32, 64 or 128")
        if dtype is None and self.config.quantization.quantization_mode is not None:
            dtype = torch.float16  # the af16 of wf6af16
        self._model = RaggedModel.of(model, None if dtype is None else _dtype(dtype))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._group = group_of(TensorParallelConfig(tp_size=self.config.tensor_parallel.tp_size), device)
        plan = _plan(self._model, self.config, kv_dtype, block_tokens, device, self._group)
        self._weights: ModelWeights | None = self._model.load(plan)
        blocks = self._num_blocks(plan)
        self.plan = replace(plan, num_blocks=blocks)
        self._engine = Engine(self.plan, weights=self._weights, group=self._group)
        self._swap = SwapSpace(self._engine.caches, None)
        self._sequences = RaggedSequences(blocks, block_tokens, max_tracked=limits.max_tracked_sequences)

    # -- computing --------------------------------------------------------------------------------------------------

    def put(self, uids: Iterable[int], tokens: Iterable[Tensor | Sequence[int]], do_checks: bool = True) -> Tensor:
        """Computes tokens of each sequence; float32 logits [len(uids), vocab] of each one's last token.

        tokens: of each sequence, integers or an integer tensor on the host; a uid that is not tracked begins one.
        Raises SchedulingError where can_schedule says that it cannot be. do_checks: False does not ask it, and what
        cannot be is found on the way: RuntimeError for a limit of the batch or of sequences, SchedulingError for blocks
        and context. Raises ValueError for a uid that is there twice or offloaded, and for what is no token.
        """
        self._weights_here()
        token_ids = checked_tokens(tokens, self.plan.architecture.vocab_size)
        uids, lengths = [int(uid) for uid in uids], [len(ids) for ids in token_ids]
        _check_lengths(uids, lengths)
        if do_checks and (result := self.can_schedule(uids, lengths)) is not SchedulingResult.Success:
            raise SchedulingError(result)
        limits, sequences = self._limits, self._sequences
        batch = RaggedEntries(max_tokens=limits.max_ragged_batch_size, max_sequences=limits.max_ragged_sequence_count)
        with sequences.all_or_nothing(uids):
            taking_part: list[TrackedSequence] = []
            for uid, ids in zip(uids, token_ids, strict=True):
                sequence = sequences.get_or_create(uid)
                if sequence.is_offloaded:
                    raise ValueError(f"uid {uid}: is offloaded; restore it first")
                if sequence.seen_tokens + len(ids) > self.plan.max_context:
                    raise SchedulingError(SchedulingResult.SequenceTokenLimitExceeded)
                sequences.extend(sequence, len(ids))
                sequence.in_flight_tokens = len(ids)
                batch.insert(ids, sequence.seen_tokens, sequence.blocks)
                taking_part.append(sequence)
            # the engine's next forward may overwrite them
            logits = self._engine.forward(batch.entries).clone() if taking_part else self._no_logits()
        for sequence in taking_part:
            sequence.seen_tokens += sequence.in_flight_tokens
            sequence.in_flight_tokens = 0
        return logits

    # -- what can be computed ---------------------------------------------------------------------------------------

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        """Whether so many tokens of each sequence can be put at once. An offloaded sequence has no cache to go on with.

        Raises ValueError for a uid that is there twice, and for lengths below 1.
        """
        uids, lengths = [int(uid) for uid in uids], [int(length) for length in lengths]
        _check_lengths(uids, lengths)
        limits, sequences = self._limits, self._sequences
        if len(uids) > limits.max_ragged_sequence_count:
            return SchedulingResult.BatchSequenceLimitExceeded
        free, tracked = sequences.num_free, len(sequences)
        for uid, length in zip(uids, lengths, strict=True):
            sequence = sequences.get(uid)
            tracked += sequence is None
            if (sequence.seen_tokens if sequence else 0) + length > self.plan.max_context:
                return SchedulingResult.SequenceTokenLimitExceeded
            free -= sequences.blocks_missing(uid, length)
            if free < 0 or (sequence and sequence.is_offloaded):
                return SchedulingResult.KVCacheLimitExceeded
        if tracked > limits.max_tracked_sequences:
            return SchedulingResult.EngineSequenceLimitExceeded
        if sum(lengths) > limits.max_ragged_batch_size:
            return SchedulingResult.BatchTokenLimitExceeded
        return SchedulingResult.Success

    def query(self, uid: int, max_tokens: int, max_blocks: int) -> tuple[int, int]:
        """How many of the next `max_tokens` tokens of a sequence fit if it may have `max_blocks` more blocks, and how
        many of these it takes. (0, 0) for an offloaded one, and for one that could not be tracked.
        """
        if max_tokens < 0 or max_blocks < 0:
            raise ValueError(f"max_tokens and max_blocks must not be negative, got {max_tokens} and {max_blocks}")
        sequence = self._sequences.get(uid)
        if sequence is None and len(self._sequences) >= self._limits.max_tracked_sequences:
            return 0, 0
        seen, held = (sequence.seen_tokens, len(sequence.blocks)) if sequence else (0, 0)
        if sequence is not None and sequence.is_offloaded:
            return 0, 0
        room = (held + max_blocks) * self.plan.layout.block_tokens - seen
        fitting = max(min(max_tokens, self.plan.max_context - seen, room), 0)
        return fitting, self._sequences.blocks_missing(uid, fitting)

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that fit into the blocks that a sequence has already; 0 for one that is not tracked, or offloaded."""
        sequence = self._sequences.get(uid)
        if sequence is None or sequence.is_offloaded:
            return 0
        return len(sequence.blocks) * self.plan.layout.block_tokens - sequence.seen_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._sequences.num_free

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can hold between them."""
        return self._sequences.num_total

    @property
    def sequences(self) -> RaggedSequences:
        """Those that are tracked: to look at."""
        return self._sequences

    # -- coming and going -------------------------------------------------------------------------------------------

    def flush(self, uid: int) -> None:
        """Forgets a sequence and frees its blocks, or its place in host memory. One that is not tracked: a warning."""
        sequence = self._sequences.flush(uid)
        if sequence is not None and sequence.saved is not None:
            self._swap.drop(sequence.saved)

    def export_sequence(self, uid: int) -> SequenceState:
        """A copy of what the cache holds of a sequence, which stays. Raises ValueError for one that is not tracked.

        Of several ranks each returns the heads of all: what another engine takes, however many ranks that one has.
        """
        sequence = self._sequences.known(uid)
        own = sequence.saved or SequenceState.take(self._engine.kv, sequence.blocks, sequence.seen_tokens)
        return own if self._group is None else _of_all_ranks(own, self._model.architecture, self._group)

    def import_sequence(self, uid: int, state: SequenceState, *, convert_dtype: bool = False) -> None:
        """Goes on with what an engine of the same model has exported; its blocks may be of another size.

        convert_dtype: its keys and values may be kept as another dtype. Raises ValueError for a uid that is tracked and
        for a state that does not fit, SchedulingError where there is no room for it.
        """
        if self._sequences.get(uid) is not None:
            raise ValueError(f"uid {uid}: is tracked already; flush it first")
        state.check_fits(self.plan.layout, convert_dtype=convert_dtype)
        if state.num_tokens > self.plan.max_context:
            raise SchedulingError(SchedulingResult.SequenceTokenLimitExceeded)
        if len(self._sequences) >= self._limits.max_tracked_sequences:
            raise SchedulingError(SchedulingResult.EngineSequenceLimitExceeded)
        with self._sequences.all_or_nothing([uid]):
            sequence = self._sequences.get_or_create(uid)
            self._sequences.extend(sequence, state.num_tokens)
            state.put(self._engine.kv, sequence.blocks)
            sequence.seen_tokens = state.num_tokens

    def offload(self, uid: int) -> None:
        """Moves what the cache holds of a sequence to host memory and frees its blocks; `restore` brings it back.

        Raises ValueError for one that is not tracked or is offloaded, and where `offload` is not set in state_manager.
        """
        if not self._limits.offload:
            raise ValueError("state_manager.offload: false; set it to have sequences offloaded")
        sequence = self._sequences.known(uid)
        if sequence.is_offloaded:
            raise ValueError(f"uid {uid}: is offloaded already")
        sequence.saved = self._swap.save(sequence.blocks, sequence.seen_tokens)
        self._sequences.release_blocks(sequence)

    def restore(self, uid: int) -> None:
        """Brings an offloaded sequence back into blocks. Raises ValueError for one that is not offloaded, and
        SchedulingError where there are too few blocks.
        """
        sequence = self._sequences.known(uid)
        if sequence.saved is None:
            raise ValueError(f"uid {uid}: is not offloaded")
        with self._sequences.all_or_nothing([uid]):
            sequence.blocks = self._sequences.allocate(sequence.saved.num_blocks(self.plan.layout.block_tokens))
            self._swap.restore(sequence.saved, sequence.blocks)
        sequence.saved = None

    # -- the engine itself ------------------------------------------------------------------------------------------

    def serialize(self, path: str | Path) -> None:
        """Writes model and packed weights into a folder that a RaggedEngine is made of without packing anything."""
        self._model.save(Path(path), self.plan, self._weights_here())
        least(self._group, 0)  # no rank goes on before all have written

    def destroy(self) -> None:
        """Frees weights, cache and sequences; nothing can be put any more. Once is enough, twice is no harm."""
        if self._weights is None:
            return
        for sequence in self._sequences:
            self.flush(sequence.uid)
        self._engine.close()
        self._weights = None

    def _num_blocks(self, plan: EnginePlan) -> int:
        """As many as every rank has memory for. Raises ValueError on all of them if one has none."""
        blocks, error = 0, None
        try:
            blocks = num_blocks(plan.layout, self._limits, plan.max_context, free_memory(plan.device))
        except ValueError as own:
            error = own
        blocks = least(self._group, blocks)
        if not blocks:
            raise error or ValueError("Insufficient memory to allocate KV-caches on another rank")
        return blocks

    def _weights_here(self) -> ModelWeights:
        if self._weights is None:
            raise RuntimeError("this engine was destroyed; make another one")
        return self._weights

    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.plan.architecture.vocab_size, device=self.plan.device)


def _dtype(given: Any) -> torch.dtype:
    dtype = DTYPES.get(dtype_name(given))
    if dtype is None:
        raise ValueError(f"dtype: {given} is not computed in; use {', '.join(DTYPES)}")
    return dtype


def _check_lengths(uids: Sequence[int], lengths: Sequence[int]) -> None:
    if len(uids) != len(lengths):
        raise ValueError(f"{len(uids)} uids, and tokens of {len(lengths)} sequences")
    if len(set(uids)) < len(uids):
        twice = next(uid for index, uid in enumerate(uids) if uid in uids[:index])
        raise ValueError(f"uid {twice}: is there twice; put a sequence's tokens as one")
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths: {min(lengths)}; a sequence takes part with one token at least")


def _plan(
    model: RaggedModel,
    config: RaggedEngineConfig,
    kv_dtype: str | None,
    block_tokens: int,
    device: str,
    group: Group | None,
) -> EnginePlan:
    """But for the number of blocks, which the memory decides that the weights leave."""
    limits, mode = config.state_manager, config.quantization.quantization_mode
    dtype = str(model.dtype).removeprefix("torch.")
    shard = None if group is None else Shard(group.rank, group.size)
    if shard is not None:
        Partition(model.architecture, shard)  # what cannot be cut is said before a weight is read
    return EnginePlan(
        files=model.files,
        architecture=model.architecture,
        dtype=dtype,
        layout=KvLayout.of(model.architecture, model.digest_as(mode), kv_dtype or dtype, block_tokens, shard),
        quantization=QuantizationPlan.of_ragged(mode),
        device=device,
        num_blocks=0,
        max_context=min(limits.max_context, model.architecture.max_context),
        batch_tokens=limits.max_ragged_batch_size,
        max_running=min(limits.max_ragged_sequence_count, _REPLAYED),
        num_threads=torch.get_num_threads() or len(os.sched_getaffinity(0)),
        deterministic=True,
        enable_cuda_graph=True,
        eos_token_ids=(),
        allow_pickle=False,
        shard=shard,
    )


def _of_all_ranks(own: SequenceState, architecture: Architecture, group: Group) -> SequenceState:
    """Every rank has to call it, and gets the same."""
    layout = own.layout
    shares = head_shares(architecture.num_heads, architecture.num_kv_heads, group.size)
    widths = [len(share.kv_heads) * layout.format.plane_bytes for share in shares]
    planes = own.blocks.view(-1, widths[group.rank]).to(group.device)
    columns = group.gather(planes, widths).cpu().split(widths, 1)
    states: list[SequenceState] = []
    for share, part in zip(shares, columns, strict=True):
        rank_layout = replace(layout, first_kv_head=share.kv_heads.start, num_kv_heads=len(share.kv_heads))
        blocks = part.contiguous().view(len(own.blocks), rank_layout.block_bytes)
        states.append(SequenceState(rank_layout, blocks, own.num_tokens))
    return SequenceState.joined(states)
