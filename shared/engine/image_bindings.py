"""Whose ops image models compute with: the engine's, or torch's where these were measured to be faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kernels import device as devices
from kernels.linear import has_pairs
from kernels.quantization import Quantization

Implementation = Literal["engine", "torch"]
OPS = ("linear", "attention", "group_norm", "layer_norm", "activation")
_MAX_HEAD_DIM = {"cpu": 512, "cuda": 256}  # of kernels/attention.py


@dataclass(frozen=True)
class Binding:
    """Whose op computes something, and why."""

    op: str
    implementation: Implementation
    why: str


def bindings(device: str, dtype: torch.dtype, quantization: Quantization | None = None) -> dict[str, Binding]:
    """What the layers of an image model compute with, op → Binding.

    On a CPU by measurement (docs/benchmarks.md has the ratios): the engine's where it is as fast or faster.
    """
    triton = device == "cuda" or devices.INTERPRETED
    found = {op: Binding(op, "engine", "Triton's kernel" if triton else "as fast as torch's, or faster") for op in OPS}
    if quantization is not None:
        found["linear"] = Binding("linear", "engine", f"{quantization.form} weights")
    elif not triton:
        found["linear"] = Binding("linear", "torch", "thousands of rows: oneDNN is up to 1.8 times as fast")
    if not triton and not has_pairs(dtype):
        found["attention"] = Binding("attention", "torch", "up to 1.3 times as fast in float32")
    return found


def attention_binding(binding: Binding, device: str, head_dim: int) -> Binding:
    """That of a layer: the engine's op takes some head_dims only."""
    most = _MAX_HEAD_DIM["cuda" if devices.INTERPRETED else device]
    if binding.implementation == "torch" or (head_dim % 8 == 0 and head_dim <= most):
        return binding
    return Binding("attention", "torch", f"head_dim {head_dim} is no multiple of 8 up to {most}")
