"""Writes what an engine loaded, in the dtype that it computes in: the option `save_mp_checkpoint_path`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kernels.quantization import Quantization
from shared.checkpoint import Checkpoint, Sizes, save_mp_checkpoint
from shared.checkpoint.cut_tables import table_for
from shared.checkpoint.recast import RecastCheckpoint
from shared.config import InferenceConfig
from shared.engine.given import sizes_of
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.shapes import LINEARS, layer_shapes
from shared.parallel.group import Group
from shared.policies.names import choose
from shared.policies.policy import Policy


def save(
    checkpoint: Checkpoint,
    fields: Mapping[str, object],
    config: InferenceConfig,
    dtype: torch.dtype,
    quantized: Mapping[str, Quantization] | None = None,
    group: Group | None = None,
) -> None:
    """By the checkpoint's own names, a shard for each rank; rank 0 of a group writes them all, and the others wait.

    quantized: how some are kept. Raises CheckpointError naming a parameter.
    """
    assert config.save_mp_checkpoint_path
    if group is not None and group.rank != 0:
        _wait_for_first(group)
        return
    table = table_for(checkpoint.names()).sized(sizes_of(fields) or Sizes())
    recast = RecastCheckpoint(checkpoint, dtype, quantized)
    save_mp_checkpoint(Path(config.save_mp_checkpoint_path), recast, table, config.tensor_parallel.tp_size)
    if group is not None:
        _wait_for_first(group)


def _wait_for_first(group: Group) -> None:
    group.broadcast(torch.zeros(1, dtype=torch.uint8, device=group.device))


def quantized_of(
    policy: Policy, architecture: Architecture, present: set[str], plan: QuantizationPlan
) -> dict[str, Quantization]:
    """The linears that are stored as they are computed, [out, in] and in our order: these are read again by rows, and
    those of another order are made of floats."""
    found: dict[str, Quantization] = {}
    for layer in range(architecture.num_layers):
        for ours, shape in layer_shapes(architecture, layer).items():
            module = ours.removesuffix(".weight")
            if module not in LINEARS:
                continue
            source = choose(policy.names.get(ours, ()), present) if policy.names.get(ours) else None
            how = plan.of(f"layers.{layer}.{module}", shape[1])
            if source is not None and source.how == "rows" and how is not None:
                found |= {name.removeprefix(f"{policy.base}."): how for name in source.at(layer).names}
    stored = {name: name.removeprefix(f"{policy.base}.") for name in present}
    return {name: found[ours] for name, ours in stored.items() if ours in found}
