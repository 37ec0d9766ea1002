"""Reads parameters of a model by their Hugging Face names, whatever file they lie in.

Files are mapped, so a parameter takes memory only from `tensor(name)` until the caller drops it.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.gguf_header import GgufError, GgufTensor, read_gguf_header
from shared.model_files import ModelError, ModelFiles


class CheckpointError(ModelError):
    """A weight file cannot be read, or lacks or has too many parameters; the message names them."""


class Checkpoint(Protocol):
    """Parameters by name. `tensor` gives the stored shape and dtype (GGUF: float32), and KeyError for a wrong name."""

    def names(self) -> set[str]: ...

    def tensor(self, name: str) -> Tensor: ...


def open_checkpoint(files: ModelFiles, *, allow_pickle: bool = False) -> Checkpoint:
    """Raises CheckpointError for files that cannot be read, and for pickle unless `allow_pickle`."""
    paths = files.weights.paths
    if files.weights.kind == "safetensors":
        return SafetensorsCheckpoint(paths)
    if files.weights.kind == "gguf":
        return GgufCheckpoint(paths[0])
    if not allow_pickle:
        raise CheckpointError(f"{paths[0]} is pickle, which can run code: pass --allow-pickle if you trust its source")
    return PickleCheckpoint(paths)


def check_names(present: set[str], expected: set[str], ignored: Iterable[str] = ()) -> None:
    """CheckpointError naming the parameters that are missing or that the decoder would leave unused.

    `ignored` are regular expressions of names that may be there without being expected.
    """
    missing = sorted(expected - present)
    unused = sorted(name for name in present - expected if not any(re.fullmatch(rule, name) for rule in ignored))
    problems = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for what, names in (("missing", missing), ("not expected by this family", unused))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint's parameters do not fit its config.json: {'; '.join(problems)}")


class SafetensorsCheckpoint:
    """One or more safetensors files."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._shard_of = {}
        for path in paths:
            try:
                shard = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
            self._shard_of |= dict.fromkeys(shard.keys(), shard)

    def names(self) -> set[str]:
        return set(self._shard_of)

    def tensor(self, name: str) -> Tensor:
        return self._shard_of[name].get_tensor(name)


class PickleCheckpoint:
    """Files of torch.save, read with `weights_only=True`: tensors and plain containers, no code."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(f"{path} is not a plain torch checkpoint: {reason}") from error
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise CheckpointError(f"{path} does not hold a dictionary of tensors")
            self._tensors |= loaded

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


# GGUF's names and Hugging Face's, for the families served.
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DEQUANTISE_ELEMENTS = 1 << 20
# Frequencies, which the config says already.
_GGUF_IGNORED = {"rope_freqs.weight"}


class GgufCheckpoint:
    """A GGUF file, each tensor dequantised to float32 when asked for."""

    def __init__(self, path: Path) -> None:
        try:
            header = read_gguf_header(path)
            architecture = str(header.metadata.get("general.architecture"))
            num_heads = header.integer(f"{architecture}.attention.head_count")
            num_kv_heads = header.metadata.get(f"{architecture}.attention.head_count_kv", num_heads)
        except (GgufError, OSError) as error:
            raise CheckpointError(str(error)) from error
        # llama.cpp stores the rows of each head of a llama so that rope turns neighbours, not halves.
        is_permuted = architecture == "llama"
        self._heads = {"q_proj": num_heads, "k_proj": int(str(num_kv_heads))} if is_permuted else {}
        self._tensors = dict(_renamed(header.tensors))
        # A plain array over the mapping: slicing numpy's own memmap class is slow.
        self._data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        values = self._dequantised(self._tensors[name])
        for projection, num_heads in self._heads.items():
            if f".{projection}." in name:
                pairs = values.reshape(num_heads, len(values) // num_heads // 2, 2, -1)
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(values)

    def _dequantised(self, tensor: GgufTensor) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        try:
            kind = GGMLQuantizationType(tensor.type_id)
            elements_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
            num_blocks = tensor.num_elements // elements_per_block
            raw = self._data[tensor.offset : tensor.offset + num_blocks * bytes_per_block]
            if raw.nbytes < num_blocks * bytes_per_block:
                raise CheckpointError(f"{tensor.name} lies beyond the end of the GGUF file, which is cut short")
            # The package works on 16 rows at a time, which is slow; blocks do not care which row they are in.
            step = max(1, _DEQUANTISE_ELEMENTS // elements_per_block) * bytes_per_block
            values = np.empty(tensor.num_elements, dtype=np.float32)
            for start in range(0, raw.nbytes, step):
                part = dequantize(raw[start : start + step].reshape(1, -1), kind)
                first = start // bytes_per_block * elements_per_block
                values[first : first + part.size] = part[0]
        except (ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"{tensor.name} has GGUF type {tensor.type_id}, which the gguf package cannot dequantise"
            ) from error
        return values.reshape(tensor.shape)


def _renamed(tensors: dict[str, GgufTensor]) -> Iterator[tuple[str, GgufTensor]]:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    for name, tensor in tensors.items():
        if name in _GGUF_IGNORED:
            continue
        stem, _, suffix = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        prefix, stem = (f"model.layers.{block[1]}.", block[2]) if block else ("", stem)
        renamed = _GGUF_NAMES.get(stem)
        yield (f"{prefix}{renamed}.{suffix}" if renamed else name), tensor
