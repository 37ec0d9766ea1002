"""What activations, weights and plain caches may be. Every op computes in float32, and rounds its result once."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}  # as kernels/cpu/simd.h numbers them
