"""Checkpoints of every form, read one parameter at a time by its name (contract.py), and written in two (below).

opening.py finds out which form it is: safetensors.py, gguf.py and pickle.py are single files and models in several of
them; description.py is DeepSpeed's JSON, training_folder.py its training's folders, injected.py the layers that its
kernels replaced, megatron.py Megatron-LM's GPT-2. tensor_parallel.py joins and cuts shards by the tables of cuts.py and
cut_tables.py. mp_checkpoint.py writes shards, flat.py one buffer that is mapped.
"""

from shared.checkpoint.contract import (
    Checkpoint,
    CheckpointError,
    OnDisk,
    PipelineCheckpointError,
    UnsupportedCheckpointError,
    check_names,
    place_of,
)
from shared.checkpoint.cut_tables import GPT2, HUGGING_FACE, INJECTED, MEGATRON
from shared.checkpoint.cuts import Cut, CutTable, Sizes
from shared.checkpoint.flat import FlatCheckpoint, save_flat
from shared.checkpoint.gguf import GgufCheckpoint
from shared.checkpoint.megatron import megatron_checkpoint
from shared.checkpoint.mp_checkpoint import MappingCheckpoint, save_mp_checkpoint
from shared.checkpoint.opening import open_any, open_checkpoint
from shared.checkpoint.pickle import PickleCheckpoint
from shared.checkpoint.safetensors import SafetensorsCheckpoint
from shared.checkpoint.tensor_parallel import TensorParallelCheckpoint

__all__ = [
    "GPT2",
    "HUGGING_FACE",
    "INJECTED",
    "MEGATRON",
    "Checkpoint",
    "CheckpointError",
    "Cut",
    "CutTable",
    "FlatCheckpoint",
    "GgufCheckpoint",
    "MappingCheckpoint",
    "OnDisk",
    "PickleCheckpoint",
    "PipelineCheckpointError",
    "SafetensorsCheckpoint",
    "Sizes",
    "TensorParallelCheckpoint",
    "UnsupportedCheckpointError",
    "check_names",
    "megatron_checkpoint",
    "open_any",
    "open_checkpoint",
    "place_of",
    "save_flat",
    "save_mp_checkpoint",
]
