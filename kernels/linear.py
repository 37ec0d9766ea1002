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

from kernels.cpu import library

_BATCH_HINT = 16  # the rows oneDNN packs for; one hint for all, so one layout and one order of sums
_PROBE_ROWS = (1, 2, 3, 5, 8, 17, 64)
_PANEL_WIDTH = 32  # output features side by side in kernels/cpu/linear.c
_PANEL_ROWS = 16  # with more, oneDNN catches up


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
        self.panels: Tensor | None = None  # [out / 32, in, 32] bfloat16, for few rows
        if self.dtype != self.compute_dtype:
            self.panels = _pack_panels(weight.detach())
            if not _panels_agree(self):
                self.panels = None
                self.description += ", every row count by oneDNN: its order of sums is another than ours"


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias -> [rows, out_features] of x's dtype. Raises ValueError when x breaks the contract."""
    if x.dtype != weight.dtype or x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous {weight.dtype} [rows, {weight.in_features}], got {x.dtype} {list(x.shape)}"
        )
    if weight.panels is not None and x.shape[0] <= _PANEL_ROWS:
        return _linear_rows(x, weight, weight.panels)
    return _linear_onednn(x, weight)


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


def _linear_onednn(x: Tensor, weight: LinearWeight) -> Tensor:
    y = torch.ops.mkldnn._linear_pointwise(x.to(weight.compute_dtype), weight.packed, weight.bias, "none", [], "")
    return y.to(weight.dtype)


def _linear_rows(x: Tensor, weight: LinearWeight, panels: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    library.function("tandem_linear_rows", "ppppiiii")(
        x.data_ptr(), panels.data_ptr(), None if weight.bias is None else weight.bias.data_ptr(), y.data_ptr(),
        x.shape[0], weight.in_features, weight.out_features, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _pack_panels(weight: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / 32), in, 32], filled up with zeros."""
    outputs, inputs = weight.shape
    panels = torch.zeros(-(-outputs // _PANEL_WIDTH) * _PANEL_WIDTH, inputs, dtype=weight.dtype)
    panels[:outputs] = weight
    return panels.view(-1, _PANEL_WIDTH, inputs).transpose(1, 2).contiguous()


def _panels_agree(weight: LinearWeight) -> bool:
    """Whether few rows have the bits that oneDNN gives them, for random inputs."""
    assert weight.panels is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_PANEL_ROWS, weight.in_features, generator=generator).to(weight.dtype)
    return torch.equal(_linear_rows(x, weight, weight.panels), _linear_onednn(x, weight))


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
