"""Rotary frequencies of each kind of scaling, and the table of cosines and sines.

Formulas: linear, https://www.reddit.com/r/LocalLLaMA/comments/14fgjqj; yarn, https://arxiv.org/abs/2309.00071;
longrope, https://arxiv.org/abs/2402.13753; llama3,
https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py. The order of the operations is that of
transformers 5 (modeling_rope_utils.py), so that the float32 values are the same.
"""

import math

import torch
from torch import Tensor

from shared.models.architecture import Rope


def inverse_frequencies(rope: Rope) -> Tensor:
    """float32 [rope.dim / 2]: radians per position of each rotated pair."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).to(torch.float32) / rope.dim
    if rope.kind == "yarn":
        return _yarn(rope, rope.theta**exponents)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * rope.theta**exponents)
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def cos_sin_table(rope: Rope | None, num_positions: int) -> Tensor:
    """float32 [num_positions, rope.dim]: the cosines of the rope.dim / 2 frequencies, then their sines.

    [num_positions, 0] without a rope: the op that turns queries and keys then turns nothing.
    """
    if rope is None:
        return torch.empty(num_positions, 0)
    return cos_sin_of(inverse_frequencies(rope), num_positions) * rope.attention_factor


def cos_sin_of(frequencies: Tensor, num_positions: int) -> Tensor:
    """float32 [num_positions, 2 * len(frequencies)]: the cosines of these, radians per position, then their sines."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    low, high, original = rope.low_frequency_factor, rope.high_frequency_factor, rope.original_context
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(is_between, smoothed, scaled)


def _yarn(rope: Rope, wavelength_radians: Tensor) -> Tensor:
    """Frequencies that turn often keep their speed, slow ones are interpolated, those between are blended."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    kept = 1 - torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / span, 0, 1)
    interpolated, extrapolated = 1.0 / (rope.factor * wavelength_radians), 1.0 / wavelength_radians
    return interpolated * (1 - kept) + extrapolated * kept
