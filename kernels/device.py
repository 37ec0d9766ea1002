"""Where an op runs: in C on a CPU, in Triton on a CUDA device.

With TRITON_INTERPRET=1, which is Triton's own switch, tensors on a CPU go to the Triton kernels too and are computed
by its interpreter: thousands of times slower, and the only way to run a kernel where there is no GPU.
"""

from __future__ import annotations

import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def in_triton(op: str, tensor: Tensor) -> bool:
    """Whether `op` computes this tensor in Triton rather than in C. ValueError for a device that it does not run on."""
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{op} runs on: cpu, cuda; got a tensor on {tensor.device}")
    return kind == "cuda" or INTERPRETED
