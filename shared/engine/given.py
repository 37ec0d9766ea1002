"""What a model was given as, and where its weights are: in memory, in a folder, or in the checkpoint of the options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint import Checkpoint, CheckpointError, Sizes, check_names, open_any, place_of
from shared.checkpoint.slices import part_of
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.config import InferenceConfig
from shared.engine.quantized_modules import QuantizedModule
from shared.parallel.partition import Slice


@dataclass(frozen=True)
class Given:
    """A model with its own config as config.json has it. folder: where it lies, if it was given as a folder."""

    module: nn.Module
    fields: dict[str, object]
    folder: Path | None = None

    @property
    def is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.module.parameters())

    def checkpoint(self, config: InferenceConfig) -> Checkpoint:
        """The weights: of the options' checkpoint, else of the folder, else in memory.

        Raises CheckpointError, ModelError for a folder without weights, ValueError for a model that is on the meta
        device and has none of them.
        """
        source = config.checkpoint or self.folder
        if source is None:
            if self.is_meta:
                raise ValueError("checkpoint: the model's weights are on the meta device; say where they are")
            return StateDictCheckpoint(
                {name: value.cpu() for name, value in self.module.state_dict().items()}, "the model"
            )
        return open_any(
            source,
            tag=config.checkpoint_config.tag,
            base_dir=config.base_dir,
            allow_pickle=config.checkpoint_config.allow_pickle,
            sizes=sizes_of(self.fields),
        )


def given_module(module: nn.Module, config: InferenceConfig) -> Given:
    """Its config is overridden by the options' `config`, where it is: the model's own code reads it too."""
    own = getattr(module, "config", None)
    for name, value in (config.config or {}).items():
        if own is None:
            raise ValueError(f"config: {name!r}, and the model has no config; leave it out")
        if isinstance(own, dict):
            own[name] = value
        else:
            setattr(own, name, value)
    return Given(module, {} if own is None else fields_of(own))


def fields_of(config: Any) -> dict[str, object]:
    """A model's own config, as config.json has it: of transformers, a dictionary, a dataclass or any plain object."""
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(vars(config))


def sizes_of(fields: Mapping[str, object]) -> Sizes | None:
    """What a checkpoint's shards are joined by; None where the config does not say, or says what cannot be."""
    try:
        sizes = Sizes.of_config(fields)
    except ValueError:
        return None
    return None if sizes == Sizes() else sizes


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    ignored: Iterable[str] = (),
    slices: Mapping[str, Slice] | None = None,
    read: Collection[str] = (),
) -> None:
    """Copies every parameter of a checkpoint into a module in memory, which has the same names.

    ignored: patterns of names that are not read. slices: of those that the module has a part of. read: names that were
    read already. Raises CheckpointError naming a parameter that is missing, not known or of another shape, and its
    file.
    """
    own: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if not isinstance(part, QuantizedModule):  # which take their own
            part._save_to_state_dict(own, f"{name}." if name else "", keep_vars=False)
    present, slices = checkpoint.names() - set(read), slices or {}
    # one of two names of the same memory is enough, or of a part of it
    filled = {own[name].data_ptr() for name in present & own.keys()}
    whole = {own[name].untyped_storage().data_ptr() for name in present & own.keys()}
    absent = own.keys() - present
    tied = {name for name in absent if own[name].data_ptr() in filled}
    tied |= {name for name in absent & slices.keys() if own[name].untyped_storage().data_ptr() in whole}
    optional = {name for name in own if any(re.fullmatch(rule, name) for rule in ignored)}
    check_names(present, own.keys() - tied - (optional - present), ignored)
    with torch.no_grad():
        for name in sorted(present & own.keys()):
            cut = slices.get(name)
            tensor = part_of(checkpoint, name, cut.dim, cut.ranges) if cut else checkpoint.tensor(name)
            if tensor.shape != own[name].shape:
                raise CheckpointError(
                    f"{name}: {list(tensor.shape)}{place_of(checkpoint, name)}, but the model has "
                    f"{list(own[name].shape)}"
                )
            own[name].copy_(tensor)
