"""GGUF files by Hugging Face's names, dequantised or as the integers of their blocks."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint.contract import CheckpointError
from shared.checkpoint.slices import rows_of
from shared.gguf_header import GgufError, GgufTensor, read_gguf_header

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
# Of others llama.cpp keeps weights that it has changed: Gemma's norms have 1 added, Granite's heads are permuted.
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Frequencies, which the config says already.
_GGUF_IGNORED = {"rope_freqs.weight"}


class GgufCheckpoint:
    """A GGUF file, each tensor dequantised to float32 when asked for, or as the integers of its blocks."""

    def __init__(self, path: Path) -> None:
        try:
            header = read_gguf_header(path)
            architecture = str(header.metadata.get("general.architecture"))
            num_heads = header.integer(f"{architecture}.attention.head_count")
            num_kv_heads = header.metadata.get(f"{architecture}.attention.head_count_kv", num_heads)
        except (GgufError, OSError) as error:
            raise CheckpointError(str(error)) from error
        if architecture not in _GGUF_ARCHITECTURES:
            known = ", ".join(_GGUF_ARCHITECTURES)
            raise CheckpointError(
                f"{path} is a GGUF file of {architecture}, and read are those of {known}; use the model's safetensors"
            )
        self._path = path
        # llama.cpp stores the rows of each head of a llama so that rope turns neighbours, not halves.
        is_permuted = architecture == "llama"
        self._heads = {"q_proj": num_heads, "k_proj": int(str(num_kv_heads))} if is_permuted else {}
        self._tensors = dict(_renamed(header.tensors))
        # A plain array over the mapping: slicing numpy's own memmap class is slow.
        self._data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    def names(self) -> set[str]:
        return set(self._tensors)

    def file_of(self, name: str) -> str:
        return str(self._path)

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.from_numpy(self._ordered(name, self._dequantised(tensor).reshape(tensor.shape)))

    def integers(self, name: str) -> Integers | None:
        return self.integer_rows(name, 0, self._tensors[name].shape[0])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        if dim == 0 and self._are_blocks(name, start, stop):
            values = self._dequantised(tensor, start, stop).reshape(-1, tensor.shape[1])
            return torch.from_numpy(self._ordered(name, values))
        return self.tensor(name).narrow(dim, start, stop - start)

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        tensor = self._tensors[name]
        read = _BLOCKS.get(tensor.type_id)
        if read is None or len(tensor.shape) != 2 or tensor.shape[1] % _BLOCK:
            return None
        if not self._are_blocks(name, start, stop):
            whole = self.integers(name)
            return None if whole is None else rows_of(whole, start, stop)
        bits, values, scale, offset = read(self._blocks(tensor, *_block_size(tensor), start, stop))

        def rows(part: np.ndarray) -> Tensor:
            return torch.from_numpy(self._ordered(name, part.reshape(stop - start, -1)))

        return Integers(bits, rows(values), rows(scale), None if offset is None else rows(offset))

    def _are_blocks(self, name: str, start: int, stop: int) -> bool:
        """Whether rows lie in blocks of their own, and are all of some heads where the order within heads differs."""
        tensor = self._tensors[name]
        heads = self._head_rows(name)
        if len(tensor.shape) != 2 or start % heads or stop % heads:
            return False
        return tensor.shape[1] % _block_size(tensor)[0] == 0

    def _head_rows(self, name: str) -> int:
        """Rows of a head; 1 where rows are in Hugging Face's order."""
        heads = next((heads for projection, heads in self._heads.items() if f".{projection}." in name), None)
        return 1 if heads is None else self._tensors[name].shape[0] // heads

    def _ordered(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of whole heads in Hugging Face's order."""
        head_rows = self._head_rows(name)
        if head_rows == 1:
            return rows
        return rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def _blocks(
        self, tensor: GgufTensor, elements_per_block: int, bytes_per_block: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """The bytes of a tensor's blocks, or of those of some rows, [blocks, bytes of a block].

        CheckpointError if the file ends before them.
        """
        num_bytes = tensor.num_elements // elements_per_block * bytes_per_block
        raw = self._data[tensor.offset : tensor.offset + num_bytes]
        if raw.nbytes < num_bytes:
            raise CheckpointError(
                f"{tensor.name} lies beyond the end of the GGUF file, which is cut short: {self._path}"
            )
        blocks = raw.reshape(-1, bytes_per_block)
        per_row = 1 if stop is None else tensor.shape[1] // elements_per_block
        return blocks[start * per_row : None if stop is None else stop * per_row]

    def _dequantised(self, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The values of all rows, or of some."""
        from gguf import GGMLQuantizationType, dequantize

        elements_per_block, bytes_per_block = _block_size(tensor)
        blocks = self._blocks(tensor, elements_per_block, bytes_per_block, start, stop)
        # The package works on 16 rows at a time, which is slow; blocks do not care which row they are in.
        step = max(1, _DEQUANTISE_ELEMENTS // elements_per_block)
        values = np.empty(len(blocks) * elements_per_block, dtype=np.float32)
        for start in range(0, len(blocks), step):
            try:
                part = dequantize(blocks[start : start + step].reshape(1, -1), GGMLQuantizationType(tensor.type_id))
            except (ValueError, NotImplementedError) as error:
                raise _unknown_type(tensor) from error
            first = start * elements_per_block
            values[first : first + part.size] = part[0]
        return values


def _block_size(tensor: GgufTensor) -> tuple[int, int]:
    """Elements and bytes of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    except (ValueError, KeyError) as error:
        raise _unknown_type(tensor) from error


def _unknown_type(tensor: GgufTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.name} has GGUF type {tensor.type_id}, which the gguf package cannot dequantise")


# Blocks of 32: half-precision numbers, then the integers; of 4 bits, the first 16 in the lower halves of 16 bytes.
# https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
_BLOCK = 32
_Parts = tuple[Literal[8, 4], np.ndarray, np.ndarray, np.ndarray | None]


def _halves(blocks: np.ndarray, count: int) -> np.ndarray:
    """The half-precision numbers at the beginning of each block, as float32 [blocks, count]."""
    return np.ascontiguousarray(blocks[:, : 2 * count]).view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray, first: int) -> np.ndarray:
    """Integers of 4 bits, less 8: int8 [blocks, 32]."""
    packed = blocks[:, first:]
    return np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.int8) - 8


def _read_q4_0(blocks: np.ndarray) -> _Parts:
    """d * (q - 8)"""
    scale = _halves(blocks, 1)
    return 4, _nibbles(blocks, 2), scale, np.zeros_like(scale)


def _read_q4_1(blocks: np.ndarray) -> _Parts:
    """d * q + m"""
    numbers = _halves(blocks, 2)
    scale, least = np.ascontiguousarray(numbers[:, 0]), numbers[:, 1]
    return 4, _nibbles(blocks, 4), scale, least + 8 * scale


def _read_q8_0(blocks: np.ndarray) -> _Parts:
    """d * q"""
    return 8, np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _halves(blocks, 1), None


_BLOCKS: dict[int, Callable[[np.ndarray], _Parts]] = {2: _read_q4_0, 3: _read_q4_1, 8: _read_q8_0}


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
