"""What the ragged engine runs: a model as its record and packed weights, from wherever it lies, and written out again.

config.json                   as the model has it
ragged.json                   {"format": "tandem-ragged", "digest", "dtype", "packing"}
params_rank_0_of_1/flat.*     the packed weights of each rank in one buffer that is mapped (shared/checkpoint/flat.py)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.dtypes import DTYPES
from shared.checkpoint import Checkpoint
from shared.checkpoint.flat import FlatCheckpoint, save_flat
from shared.config import InferenceConfig
from shared.engine.engine import load_plan
from shared.engine.given import given_module
from shared.engine.plan import EnginePlan
from shared.model_files import ModelFiles, find_weights, hash_file, model_digest, read_json
from shared.model_store import ModelStore
from shared.models.architecture import Architecture
from shared.models.loading import load_weights, packing_of
from shared.models.weights import ModelWeights
from shared.policies.table import POLICIES

FORMAT = "tandem-ragged"
_METADATA = "ragged.json"


@dataclass(frozen=True)
class RaggedModel:
    """What is settled before its weights are read.

    fields: config.json's. digest: of config and weights; engines whose digests differ hand nothing over. load: reads
    the weights as a plan says. files: of a model on disk.
    """

    fields: Mapping[str, object]
    architecture: Architecture
    digest: str
    dtype: torch.dtype
    load: Callable[[EnginePlan], ModelWeights]
    files: ModelFiles | None = None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype | None) -> RaggedModel:
        """model: a model of transformers in memory, a folder, a file, a name of the store, or what `save` wrote.

        dtype: default: the model's own. Raises ValueError, "Unsupported model type …", for a family that has no policy
        or answers no tokens; UnsupportedModelError, ModelError.
        """
        if isinstance(model, nn.Module):
            return cls._of_module(model, dtype)
        if not isinstance(model, str | Path):
            raise ValueError(f"model: wants a model, a folder or a name, has a {type(model).__name__}")
        if (Path(model) / _METADATA).is_file():
            return cls._saved(Path(model), dtype)
        files = _files(model)
        fields = files.config
        return cls(fields, architecture_of(fields), files.digest, dtype or _own_dtype(fields), load_plan, files)

    @classmethod
    def _of_module(cls, module: nn.Module, dtype: torch.dtype | None) -> RaggedModel:
        given = given_module(module, InferenceConfig())
        architecture = architecture_of(given.fields)
        checkpoint = given.checkpoint(InferenceConfig())
        own = next(module.parameters()).dtype

        def load(plan: EnginePlan) -> ModelWeights:
            weights = load_weights(
                architecture,
                checkpoint,
                dtype=DTYPES[plan.dtype],
                device=plan.device,
                quantization=plan.quantization,
                shard=plan.shard,
            )
            weights.probe()
            return weights

        dtype = dtype or (own if own in DTYPES.values() else torch.bfloat16)
        return cls(given.fields, architecture, _digest_of(given.fields, checkpoint), dtype, load)

    @classmethod
    def _saved(cls, folder: Path, dtype: torch.dtype | None) -> RaggedModel:
        about, fields = read_json(folder / _METADATA), read_json(folder / "config.json")
        own = DTYPES.get(str(about.get("dtype")))
        if about.get("format") != FORMAT or own is None:
            raise ValueError(f"{folder / _METADATA}: is not what serialize wrote")
        if dtype not in (None, own):
            raise ValueError(f"dtype: {dtype}, and {folder} was serialized in {own}; leave it out")
        architecture = architecture_of(fields)

        def load(plan: EnginePlan) -> ModelWeights:
            wanted = _packing(plan)
            if about.get("packing") != wanted:
                raise ValueError(
                    f"{folder} was serialized as {about.get('packing')}, and here it would be {wanted}; serialize it "
                    "here, from the model, with the same options"
                )
            flat = FlatCheckpoint(folder / _rank_folder(plan))
            tensors = {name: flat.tensor(name).to(plan.device) for name in flat.names()}
            weights = ModelWeights.from_tensors(architecture, tensors, shard=plan.shard)
            weights.probe()
            return weights

        return cls(fields, architecture, str(about.get("digest")), own, load)

    def digest_as(self, quantization_mode: str | None) -> str:
        """Of what is computed with: quantized weights are other weights, and their KV is other KV."""
        if quantization_mode is None:
            return self.digest
        return sha256(f"{self.digest} {quantization_mode}".encode()).hexdigest()

    def save(self, folder: Path, plan: EnginePlan, weights: ModelWeights) -> None:
        """Writes what `of` reads: each rank its own weights, the first one the rest. Nothing in it is code."""
        save_flat(folder / _rank_folder(plan), weights.tensors())
        if plan.shard is not None and plan.shard.rank:
            return
        (folder / "config.json").write_text(json.dumps(self.fields, indent=2, default=str) + "\n", encoding="utf-8")
        about = {"format": FORMAT, "digest": self.digest, "dtype": plan.dtype, "packing": _packing(plan)}
        (folder / _METADATA).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def architecture_of(fields: Mapping[str, object]) -> Architecture:
    """Raises ValueError for a family without a policy, UnsupportedModelError for what one cannot say."""
    model_type = str(fields.get("model_type"))
    policy = POLICIES.get(model_type)
    if policy is None or policy.kind != "decoder":
        known = ", ".join(sorted(name for name, policy in POLICIES.items() if policy.kind == "decoder"))
        raise ValueError(f"Unsupported model type {model_type}; the ragged engine runs {known}")
    return policy.architecture(fields)


def _files(model: str | Path) -> ModelFiles:
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return ModelStore().resolve(str(model))
    fields = read_json(folder / "config.json")
    architecture_of(fields)  # before the weights are read through
    weights = find_weights(folder)
    config = None if weights.kind == "gguf" else fields
    return ModelFiles(folder.name, folder, weights, model_digest(config, [hash_file(path) for path in weights.paths]))


def _own_dtype(fields: Mapping[str, object]) -> torch.dtype:
    name = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
    return DTYPES.get(name, torch.bfloat16)


def _digest_of(fields: Mapping[str, object], checkpoint: Checkpoint) -> str:
    """Of a model in memory."""
    digest = sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.tensor(name).detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rank_folder(plan: EnginePlan) -> str:
    return "params_rank_0_of_1" if plan.shard is None else f"params_rank_{plan.shard.rank}_of_{plan.shard.size}"


def _packing(plan: EnginePlan) -> str:
    ranks = 1 if plan.shard is None else plan.shard.size
    return f"{plan.device}, tp_size {ranks}: {packing_of(plan.quantization, DTYPES[plan.dtype])}"
