"""Whose ops image models compute with: the engine's, or torch's where these were measured to be faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kernels import device as devices
from kernels.linear import has_pairs
from kernels.quantization import Quantization

Implementation = Literal["engine", "torch"]
OPS = ("linear", "attention", "group_norm", "group_norm_silu", "layer_norm", "activation")
_MAX_HEAD_DIM = {"cpu": 512, "cuda": 256}  # of kernels/attention.py


@dataclass(frozen=True)
class Binding:
    """Whose op computes something, and why."""

    op: str
    implementation: Implementation
    why: str


def bindings(device: str, dtype: torch.dtype, quantization: Quantization | None = None) -> dict[str, Binding]:
    """What the layers of an image model compute with, op → Binding.

    On a CPU by measurement (benchmarks/image_ops.py): the engine's where it is as fast or faster.
    """
    triton = device == "cuda" or devices.INTERPRETED
    found = {op: Binding(op, "engine", "Triton's kernel" if triton else "as fast as torch's, or faster") for op in OPS}
    if quantization is not None:
        found["linear"] = Binding("linear", "engine", f"{quantization.form} weights")
    if triton:
        return found
    if quantization is None:
        found["linear"] = Binding("linear", "torch", "thousands of rows: up to 1.3 times as fast as the engine's")
    if not has_pairs(dtype):
        found["attention"] = Binding("attention", "torch", "without dot products of pairs: up to 1.15 times as fast")
    if dtype == torch.float32:
        found["group_norm"] = Binding("group_norm", "torch", "without SiLU: up to 1.3 times as fast")
    return found


def attention_binding(binding: Binding, device: str, head_dim: int) -> Binding:
    """That of a layer: the engine's op takes some head_dims only."""
    most = _MAX_HEAD_DIM["cuda" if devices.INTERPRETED else device]
    if binding.implementation == "torch" or (head_dim % 8 == 0 and head_dim <= most):
        return binding
    return Binding("attention", "torch", f"head_dim {head_dim} is no multiple of 8 up to {most}")
