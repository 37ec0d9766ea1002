"""What the bytes of a KV block mean to the ops that write, read and move it.

A block is the planes of its layers, keys before values, heads in order. A plane is `block_tokens` rows of head_dim
elements; in int8 and fp8, block_tokens float32 scales follow, one for each row:

    block  = plane[layer 0, keys, head 0], plane[layer 0, keys, head 1], ..., plane[layer L - 1, values, head H - 1]
    plane  = element[block_tokens, head_dim] (, scale[block_tokens])
    x      = scale * element        scale = max|x| / G, element = round(x * (1 / max|x| * G)), to nearest, ties to even

G is 127 in int8 and 448 in fp8 (e4m3, arXiv:2209.05433). A row whose max|x| is below LEAST has scale 0 and elements 0.
All of it in float32, each operation rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dtypes import CODES, DTYPES

# what a row's elements are kept as; those of int8 and fp8 are bytes
ELEMENTS = {**DTYPES, "int8": torch.int8, "fp8": torch.int8}
GREATEST = {"int8": 127.0, "fp8": 448.0}
SCALE_BYTES = 4
_QUANTIZED = {"int8": 2, "fp8": 5}  # as kernels/cpu/simd.h numbers them, beside CODES
LEAST = 2.0**-100  # far below it G / max|x| is no float32


@dataclass(frozen=True)
class KvFormat:
    """dtype: a key of ELEMENTS. head_dim: a multiple of 8. Raises ValueError for a dtype that is none of them."""

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENTS:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(ELEMENTS)}")

    @property
    def quantized(self) -> bool:
        """Whether each row has a scale."""
        return self.dtype in GREATEST

    @property
    def number(self) -> int:
        """The dtype's, as C has it."""
        return _QUANTIZED[self.dtype] if self.quantized else CODES[ELEMENTS[self.dtype]]

    @property
    def plane_bytes(self) -> int:
        row_bytes = self.head_dim * ELEMENTS[self.dtype].itemsize + (SCALE_BYTES if self.quantized else 0)
        return self.block_tokens * row_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.plane_bytes

    @property
    def form(self) -> str:
        """As KvPlanes says it."""
        return self.dtype if self.quantized else "plain"

    def elements(self, pool: Tensor) -> Tensor:
        """A view of a pool, uint8 [blocks, block_bytes]: [blocks, layers, 2, kv_heads, block_tokens, head_dim]."""
        num_bytes = self.block_tokens * self.head_dim * ELEMENTS[self.dtype].itemsize
        planes = pool.view(-1, self.num_layers, 2, self.num_kv_heads, self.plane_bytes)[..., :num_bytes]
        return planes.view(ELEMENTS[self.dtype]).unflatten(-1, (self.block_tokens, self.head_dim))

    def scales(self, pool: Tensor) -> Tensor | None:
        """A view of a pool, uint8 [blocks, block_bytes]: float32 [blocks, layers, 2, kv_heads, block_tokens]."""
        if not self.quantized:
            return None
        planes = pool.view(-1, self.num_layers, 2, self.num_kv_heads, self.plane_bytes)
        return planes[..., self.block_tokens * self.head_dim :].view(torch.float32)

    def planes(self, pool: Tensor, layer: int) -> KvPlanes:
        """A layer of a pool, uint8 [blocks, block_bytes]."""
        keys, values = self.elements(pool)[:, layer].unbind(1)
        scales = self.scales(pool)
        key_scales, value_scales = (None, None) if scales is None else scales[:, layer].unbind(1)
        return KvPlanes(keys, values, key_scales, value_scales, self.form)


@dataclass(frozen=True)
class KvPlanes:
    """A layer's keys and values, as views of a pool.

    keys         [blocks, kv_heads, block_tokens, head_dim], any strides but the last; values alike
    key_scales   [blocks, kv_heads, block_tokens] float32, any strides; value_scales alike; None where rows have none
    form         "plain", or the key of GREATEST that says what the elements mean
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    form: str = "plain"

    def c_arguments(self) -> tuple[int | None, ...]:
        """What a C op is told after all else: how elements are kept, and the scales with their strides."""
        kept = CODES[self.keys.dtype] if self.form == "plain" else _QUANTIZED[self.form]
        if self.key_scales is None or self.value_scales is None:
            return kept, None, None, 0, 0, 0, 0, 0, 0
        strides = (*self.key_scales.stride(), *self.value_scales.stride())
        return kept, self.key_scales.data_ptr(), self.value_scales.data_ptr(), *strides

    def widened(self) -> KvPlanes:
        """Reference: the numbers that the rows stand for, plain."""
        if self.key_scales is None or self.value_scales is None:
            return self
        return KvPlanes(
            widen_rows(self.keys, self.key_scales, self.form), widen_rows(self.values, self.value_scales, self.form)
        )

    def check(self, name: str, like: Tensor) -> None:
        """Raises ValueError unless an op can read and write them beside the activations `like`, called `name`."""
        keys, values = self.keys, self.values
        if self.form not in ("plain", *GREATEST):
            raise ValueError(f"form {self.form!r} is none of plain, {', '.join(GREATEST)}")
        wanted = like.dtype if self.form == "plain" else torch.int8
        if like.dtype not in CODES or keys.dtype != wanted or values.dtype != wanted:
            shared = f"{name}, keys and values must share float32, bfloat16 or float16"
            if self.form != "plain":
                shared = f"{name} must be float32, bfloat16 or float16, keys and values of {self.form} torch.int8"
            raise ValueError(f"{shared}, got {like.dtype}, {keys.dtype} and {values.dtype}")
        if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] % 8:
            raise ValueError(
                "keys and values must be [blocks, kv_heads, block_tokens, a multiple of 8], "
                f"got {list(keys.shape)} and {list(values.shape)}"
            )
        if keys.stride(3) != 1 or values.stride(3) != 1:
            raise ValueError("the last dimension of keys and values must be contiguous")
        for scales in (self.key_scales, self.value_scales):
            if (scales is None) != (self.form == "plain"):
                raise ValueError(f"key_scales and value_scales belong to int8 and fp8 alone, and form is {self.form}")
            if scales is not None and (scales.dtype != torch.float32 or scales.shape != keys.shape[:3]):
                raise ValueError(
                    f"key_scales and value_scales must be float32 {list(keys.shape[:3])}, "
                    f"got {scales.dtype} {list(scales.shape)}"
                )
        for tensor in (keys, values, self.key_scales, self.value_scales):
            if tensor is not None and tensor.device != like.device:
                raise ValueError(f"all tensors must be on {like.device} like {name}, got one on {tensor.device}")


def quantize_rows(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Reference: float rows [..., head_dim] -> their elements, int8 [..., head_dim], and scales, float32 [...]."""
    rows, greatest = rows.float(), GREATEST[dtype]
    most = rows.abs().amax(-1)
    most = torch.where(most < LEAST, 0.0, most)
    scaled = rows * torch.where(most > 0, most.reciprocal() * greatest, 0.0).unsqueeze(-1)
    if dtype == "int8":
        elements = scaled.round().clamp(-greatest, greatest).to(torch.int8)
    else:
        elements = scaled.clamp(-greatest, greatest).to(torch.float8_e4m3fn).view(torch.int8)
    return elements, most / greatest


def widen_rows(elements: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """Reference: what the rows of `quantize_rows` stand for, float32 [..., head_dim]."""
    if dtype == "fp8":
        elements = elements.view(torch.float8_e4m3fn)
    return elements.float() * scales.unsqueeze(-1)
