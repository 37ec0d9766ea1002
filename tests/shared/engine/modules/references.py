"""What tests of the modules compare with: float64, of inputs that are rounded as the module's are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dtypes import DTYPES

# of a result of about 1, after one rounding or two
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def rounded(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DTYPES[dtype])


def assert_near(got: Tensor, wanted: Tensor, dtype: str) -> None:
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def activation(x: Tensor, kind: str) -> Tensor:
    """By DeepSpeed's names, in the dtype of x; a gated one of its halves, gate first."""
    if kind in ("geglu", "reglu", "siglu"):
        gate, up = x.chunk(2, -1)
        return activation(gate, {"geglu": "gelu", "reglu": "relu", "siglu": "silu"}[kind]) * up
    if kind == "gelu":
        return functional.gelu(x, approximate="tanh")
    return {"relu": functional.relu, "silu": functional.silu, "identity": lambda same: same}[kind](x)


def norm(x: Tensor, kind: str, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    x, gamma = x.double(), gamma.double()
    if kind == "rms_norm":
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gamma
    return functional.layer_norm(x, x.shape[-1:], gamma, None if beta is None else beta.double(), eps)
