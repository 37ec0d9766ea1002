"""Writes what an engine loaded, in the dtype that it computes in: the option `save_mp_checkpoint_path`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from shared.checkpoint import Checkpoint, Sizes, save_mp_checkpoint
from shared.checkpoint.cut_tables import table_for
from shared.checkpoint.recast import RecastCheckpoint
from shared.config import InferenceConfig
from shared.engine.given import sizes_of
from shared.models.architecture import Architecture
from shared.models.shapes import LINEARS, layer_shapes
from shared.policies.names import choose
from shared.policies.policy import Policy


def save(
    checkpoint: Checkpoint,
    fields: Mapping[str, object],
    config: InferenceConfig,
    dtype: torch.dtype,
    quantized: set[str] | None = None,
) -> None:
    """By the checkpoint's own names. quantized: those that become int8. Raises CheckpointError naming a parameter."""
    assert config.save_mp_checkpoint_path
    table = table_for(checkpoint.names()).sized(sizes_of(fields) or Sizes())
    recast = RecastCheckpoint(checkpoint, dtype, quantized or ())
    save_mp_checkpoint(Path(config.save_mp_checkpoint_path), recast, table, config.tensor_parallel.tp_size)


def linears_of(policy: Policy, architecture: Architecture, present: set[str]) -> set[str]:
    """The names of linears that are stored as they are computed, [out, in] and in our order: int8 is read again by
    rows, and those of another order are made of floats."""
    found: set[str] = set()
    for layer in range(architecture.num_layers):
        for ours in layer_shapes(architecture, layer):
            if ours.removesuffix(".weight") not in LINEARS:
                continue
            source = choose(policy.names.get(ours, ()), present) if policy.names.get(ours) else None
            if source is not None and source.how == "rows":
                found |= {name.removeprefix(f"{policy.base}.") for name in source.at(layer).names}
    return {name for name in present if name.removeprefix(f"{policy.base}.") in found}
