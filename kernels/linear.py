"""Linear layers whose rows never notice each other.

    y = x @ weight.T + bias

x       [rows, in_features], contiguous, of the weight's dtype
weight  [out_features, in_features], float32 or bfloat16, packed once into a LinearWeight
bias    [out_features], the weight's dtype, or None
y       [rows, out_features]

torch's own linear picks another routine for few rows, and with it another order of summation: measured in float32, 1 to
3 rows differ from 4 and more. oneDNN with a packed weight gives a row the same bits among any number of rows;
`probe_row_invariance` checks that on the machine at hand. On a CPU without AVX-512, oneDNN has no packed bfloat16 path:
there a bfloat16 weight is held as float32 (exactly), multiplied in float32, and the result rounded to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_BATCH_HINT = 16  # the rows oneDNN packs for; one hint for all, so one layout and one order of sums
_PROBE_ROWS = (1, 2, 3, 5, 8, 17, 64)


class LinearWeight:
    """A weight [out, in] with its bias, packed for the CPU. The packed copy replaces the original, which may be freed.

    Raises ValueError for a weight or bias that breaks the contract, RuntimeError where torch has no oneDNN.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.device.type != "cpu":
            raise ValueError(f"linear runs on: cpu; got a weight on {weight.device}")
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weight must be float32 or bfloat16 [out, in], got {weight.dtype} {list(weight.shape)}")
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
            raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
        if not torch.backends.mkldnn.is_available():
            raise RuntimeError("linear needs a torch built with oneDNN (torch.backends.mkldnn)")
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.description: str
        self.packed, self.description = _pack(weight.detach())
        self.compute_dtype = torch.bfloat16 if self.description == "onednn-bf16" else torch.float32
        self.bias = None if bias is None else bias.detach().to(self.compute_dtype).contiguous()


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias -> [rows, out_features] of x's dtype. Raises ValueError when x breaks the contract."""
    if x.dtype != weight.dtype or x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous {weight.dtype} [rows, {weight.in_features}], got {x.dtype} {list(x.shape)}"
        )
    y = torch.ops.mkldnn._linear_pointwise(x.to(weight.compute_dtype), weight.packed, weight.bias, "none", [], "")
    return y.to(weight.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch, in the dtype of its inputs."""
    return functional.linear(x, weight, bias)


def probe_row_invariance(weight: LinearWeight) -> None:
    """Checks at start-up that rows keep their bits among 1, 2, 3, 5, 8, 17 and 64 rows, first or last in the batch.

    Raises RuntimeError naming the row counts that differ.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_PROBE_ROWS), weight.in_features, generator=generator).to(weight.dtype)
    expected = linear(x, weight)
    differing = [
        rows
        for rows in _PROBE_ROWS
        if not torch.equal(linear(x[:rows], weight), expected[:rows])
        or not torch.equal(linear(x[-rows:], weight), expected[-rows:])
    ]
    if differing:
        raise RuntimeError(
            f"linear ({weight.description}, {weight.out_features} x {weight.in_features}) gives other bits for "
            f"{differing} rows than for {max(_PROBE_ROWS)}: "
            "this CPU or torch build cannot keep outputs independent of the batch"
        )


def _pack(weight: Tensor) -> tuple[Tensor, str]:
    """The packed weight and the name of the arithmetic, which the CPU decides."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    if weight.dtype == torch.float32:
        return reorder(weight.contiguous(), _BATCH_HINT), "onednn-fp32"
    try:
        return reorder(weight.contiguous(), _BATCH_HINT), "onednn-bf16"
    except RuntimeError:
        packed = reorder(weight.float(), _BATCH_HINT)
        return packed, "onednn-fp32 (bf16 weights, float32 arithmetic: this CPU has no AVX-512)"
