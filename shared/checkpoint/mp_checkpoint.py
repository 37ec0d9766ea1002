"""A model written as shards of a tensor-parallel group, to be read at any degree (DeepSpeed's save_mp_checkpoint_path).

    ds_inference_config.json      the description (description.py), with relative paths, written last
    non-tp.safetensors            what lies whole on every rank
    tp_RR_of_NN.safetensors       the shard of rank RR of NN

DeepSpeed writes the same as pickle, in eight parts of each rank; both are read.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import Checkpoint, CheckpointError, some_of
from shared.checkpoint.cuts import CutTable
from shared.checkpoint.integers import Parameter, as_parts
from shared.checkpoint.safetensors import INTEGERS_KEY
from shared.checkpoint.tensor_parallel import TensorParallelCheckpoint

CONFIG_NAME = "ds_inference_config.json"
NON_TP_NAME = "non-tp.safetensors"


class MappingCheckpoint:
    """Parameters in memory."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> set[str]:
        return set(self._parameters)

    def tensor(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return parameter.dequantize() if isinstance(parameter, Integers) else parameter

    def integers(self, name: str) -> Integers | None:
        parameter = self._parameters[name]
        return parameter if isinstance(parameter, Integers) else None


def save_mp_checkpoint(
    folder: Path, tensors: Mapping[str, Parameter] | Checkpoint, cut_table: CutTable, tp_size: int
) -> Path:
    """Writes a model for `tp_size` ranks, one rank's shard in memory at a time; returns the path of its description.

    Raises CheckpointError before anything is written if a parameter has no cut, and naming one that cannot be cut.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size must be at least 1, got {tp_size}")
    whole = MappingCheckpoint(tensors) if isinstance(tensors, Mapping) else tensors
    cuts = {name: cut_table.of(name) for name in sorted(whole.names())}
    if unknown := [name for name, cut in cuts.items() if cut is None]:
        raise CheckpointError(f"no rule says how {some_of(unknown)} is cut")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / CONFIG_NAME
    # of a folder that is written anew, nobody reads old and new shards together
    config.unlink(missing_ok=True)
    dtypes: Counter[str] = Counter()
    alone = {name for name, cut in cuts.items() if cut is not None and cut.dim is None}
    _write(folder / NON_TP_NAME, {name: _stored(whole, name) for name in sorted(alone)}, dtypes)
    shards = [f"tp_{rank:02d}_of_{tp_size:02d}.safetensors" for rank in range(tp_size)]
    for rank, shard in enumerate(shards):
        cut = TensorParallelCheckpoint([whole], cut_table, rank, tp_size)
        _write(folder / shard, {name: _stored(cut, name) for name in sorted(cuts.keys() - alone)}, dtypes)
    description = {
        "type": "ds_model",
        "base_dir": "",
        "checkpoints": {"non_tp": [NON_TP_NAME], "tp": shards},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": tp_size,
        "dtype": _dtype(dtypes),
        "sizes": {name: size for name, size in asdict(cut_table.sizes).items() if size is not None},
        "cuts": {name: asdict(cut) for name, cut in cuts.items() if cut is not None},
    }
    config.write_text(json.dumps(description, indent=1) + "\n")
    return config


def _stored(checkpoint: Checkpoint, name: str) -> Parameter:
    integers = checkpoint.integers(name)
    return checkpoint.tensor(name) if integers is None else integers


def _write(path: Path, parameters: Mapping[str, Parameter], dtypes: Counter[str]) -> None:
    tensors, table = as_parts(parameters)
    # a file holds each tensor once, and whole
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    for tensor in own.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    save_file(own, path, metadata={INTEGERS_KEY: json.dumps(table)} if table else None)


def _dtype(dtypes: Counter[str]) -> str:
    """What most of a model is, of the dtypes that a description may name."""
    known = [(count, name) for name, count in dtypes.items() if name in ("float32", "float16", "bfloat16", "int8")]
    return max(known)[1] if known else "float32"
