"""Linear layers whose rows never notice each other.

    y = x @ weight.T + bias

x       [rows, in_features], contiguous, of the weight's dtype
weight  [out_features, in_features], float32, bfloat16 or float16, packed once into a LinearWeight, perhaps quantized
bias    [out_features], the weight's dtype, or None
y       [rows, out_features]; computed in float32 and rounded once

On a CPU: torch's own linear picks another routine for few rows, and with it another order of summation: measured in
float32, 1 to 3 rows differ from 4 and more. kernels/cpu/linear.c sums an output in one order whatever the number of
rows and threads. With AVX-512 BF16, bfloat16 rows go to kernels/cpu/linear_pairs.c, whose dot products of pairs are
several times faster. Its bits are those of linear.c, but for int4 and denormals. oneDNN's packed bfloat16 linear is no
choice: on Zen 4 it was measured to give one row other bits than many. `probe_row_invariance` checks this machine.

On CUDA: kernels/cuda/linear.py sums in one order too. Who does not need a row's bits to be its own may have a weight
that is not quantized multiplied by cuBLAS.

A quantized weight (kernels/quantization.py) is kept as few bits, and multiplied by activations that stay what they are:
one row reads the whole weight and computes little with it, so half the bytes are half the time. Products and sums are
float32; on CUDA the weights of groups, scale * q + offset, are rounded to x's dtype before. With dynamic activations
rows of x become int8 as a KV cache's do (kernels/kv_format.py), products and sums are of integers, and kernels/cpu/
linear_integers.c and CUDA give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import library, panels
from kernels.device import in_triton
from kernels.dtypes import CODES
from kernels.quantization import Integers, Quantization, floats_of, quantize

_FORM_CODES = {"int8": 2, "int4": 3, "fp8": 5, "fp6": 6}  # as kernels/cpu/simd.h numbers them
_PACKINGS = {
    "panels": "panels, float32 products",
    "pairs": "pairs, bfloat16 products",
    "fours": "fours, integer products",
    "rows": "rows, Triton",
}
_OPS = {"panels": "", "pairs": "_pairs", "fours": "_integers"}  # what the names of their ops end in
_MOST_INTEGERS = 2**31 // 127**2  # products of two int8 that can be added up
_PROBE_ROWS = (1, 2, 5, 10, 17)


class LinearWeight:
    """A weight [out, in] with its bias, packed for its device. The copy replaces the original, which may be freed.

    `dtype`: of x, and what y is rounded to; the weight's own before it was quantized.
    Raises ValueError for a weight, bias or group that breaks the contract.
    """

    FIELDS = ("packed", "scale", "offset", "bias", "how")  # of `tensors`

    def __init__(self, weight: Tensor, bias: Tensor | None = None, quantization: Quantization | None = None) -> None:
        if weight.dim() != 2 or not weight.shape[1] or weight.dtype not in CODES:
            raise ValueError(
                f"weight must be float32, bfloat16 or float16 [out, in], got {weight.dtype} {list(weight.shape)}"
            )
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
            raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
        self._take_shape(weight.shape, weight.dtype, quantization, packing(weight.dtype, weight))
        if self.in_features % self.group:
            raise ValueError(f"{self.in_features} input features cannot be cut into groups of {self.group}")
        weight = weight.detach()
        if quantization is None:
            self._take(weight, None, None, bias)
        else:
            self._take(*quantize(weight, quantization), bias)

    @classmethod
    def of_integers(
        cls, integers: Integers, bias: Tensor | None, dtype: torch.dtype, *, dynamic: bool = False
    ) -> LinearWeight:
        """A weight that comes quantized. dtype: of x, and of bias. dynamic: as of a Quantization."""
        weight = cls.__new__(cls)
        values = integers.values
        quantization = replace(integers.quantization, dynamic=dynamic)
        chosen = packing(dtype, values)
        if chosen == "pairs" and quantization.form == "int8" and bool((values == -128).any()):
            chosen = "panels"  # pairs have no -128, which some files have and `quantize` does not
        weight._take_shape(values.shape, dtype, quantization, chosen)
        weight._take(values, integers.scale, integers.offset, bias)
        return weight

    def _take_shape(
        self, shape: Sequence[int], dtype: torch.dtype, quantization: Quantization | None, packing: str
    ) -> None:
        self.dtype, self.quantization = dtype, quantization
        self.out_features, self.in_features = shape
        self.of_outputs = self.out_features
        is_dynamic = quantization is not None and quantization.dynamic
        if is_dynamic and self.in_features > _MOST_INTEGERS:
            raise ValueError(
                f"dynamic activations have sums of 32 bits: in_features must be {_MOST_INTEGERS} at most, "
                f"got {self.in_features}"
            )
        self._packing = "fours" if is_dynamic and packing != "rows" else packing
        self.group = (quantization and quantization.group) or self.in_features  # input features that share a scale

    def _take(self, values: Tensor, scale: Tensor | None, offset: Tensor | None, bias: Tensor | None) -> None:
        if self._packing == "rows":
            from kernels.cuda import rows

            self.packed, self.scale, self.offset = rows.pack(values, self.form), scale, offset
        else:
            if self._packing == "fours":
                self.packed = panels.pack_fours(values)
            else:
                self.packed = panels.pack(values, self.form, group=self.group, pairs=self._packing == "pairs")
            # [ceil(out / 32), groups, 32]
            self.scale, self.offset = (None if part is None else panels.pack_scales(part) for part in (scale, offset))
        self.bias = None if bias is None else bias.detach().contiguous()

    def as_part_of(self, outputs: int) -> LinearWeight:
        """This weight, from now on some of so many outputs of a linear, each with the bits that it has among them all:
        on CUDA their number decides the order of sums."""
        self.of_outputs = outputs
        return self

    @property
    def form(self) -> str:
        """int8, int4, fp8 or fp6; plain where nothing was quantized."""
        return self.quantization.form if self.quantization else "plain"

    @property
    def description(self) -> str:
        """How it is packed, for logs and errors."""
        if self.quantization is not None:
            size = "rows" if self.quantization.group is None else f"groups of {self.quantization.group}"
            kind = "symmetric" if self.quantization.symmetric else "with offsets"
            dynamic = ", dynamic activations" * self.quantization.dynamic
            return f"{self.form} {_PACKINGS[self._packing]}, {size}, {kind}{dynamic}"
        return f"{str(self.dtype).removeprefix('torch.')} {_PACKINGS[self._packing]}"

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, to be stored; `how`, on a CPU, is its quantization."""
        how = None if self.quantization is None else self.quantization.as_tensor()
        fields = zip(self.FIELDS, (self.packed, self.scale, self.offset, self.bias, how), strict=True)
        return {field: tensor for field, tensor in fields if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> LinearWeight:
        """The weight that `tensors` came from, over the same memory. Raises KeyError if it came from none.

        shape: [out, in]; dtype: as it had it.
        """
        weight = cls.__new__(cls)
        weight.packed = tensors["packed"]
        weight.scale, weight.offset, weight.bias = (tensors.get(field) for field in ("scale", "offset", "bias"))
        quantization = None if weight.scale is None else Quantization.of_tensor(tensors["how"])
        chosen = packing(dtype, weight.packed)
        if chosen == "pairs" and quantization and quantization.form == "int8" and weight.packed.dim() == 3:
            chosen = "panels"  # with a -128
        weight._take_shape(shape, dtype, quantization, chosen)
        return weight

    @property
    def num_bytes(self) -> int:
        """What one row reads: the packed weight, scales, offsets and bias."""
        return sum(
            t.numel() * t.element_size() for t in (self.packed, self.scale, self.offset, self.bias) if t is not None
        )

    def plain(self) -> Tensor:
        """The weight [out, in] that it was packed from. ValueError where that was quantized."""
        if self.quantization is not None:
            raise ValueError(f"{self.description}: what it was made of is gone")
        if self._packing == "rows":
            return self.packed
        return panels.unpack_plain(self.packed, (self.out_features, self.in_features), pairs=self._packing == "pairs")

    def dequantize(self) -> Tensor:
        """The weight that the arithmetic stands for, float32 [out, in]. ValueError where nothing was quantized."""
        if self.quantization is None or self.scale is None:
            raise ValueError(f"{self.description}: not quantized")
        scale, offset = self.scale, self.offset
        if self._packing == "rows":
            from kernels.cuda import rows

            values = rows.unpack(self.packed, self.form, self.in_features)
        else:
            shape = (self.out_features, self.in_features)
            if self._packing == "fours":
                values = panels.unpack_fours(self.packed, shape)
            else:
                values = panels.unpack(self.packed, shape, self.form, group=self.group, pairs=self._packing == "pairs")
            scale = panels.unpack_scales(scale, self.out_features)
            offset = None if offset is None else panels.unpack_scales(offset, self.out_features)
        numbers = floats_of(values, self.form) if self.quantization.floating else values
        weight = scale[:, :, None] * numbers.unflatten(1, (-1, self.group))
        if offset is not None:
            weight += offset[:, :, None]
        return weight.flatten(1).contiguous()


def has_pairs(dtype: torch.dtype) -> bool:
    """Whether rows of that dtype go to this CPU's dot products of pairs."""
    return dtype == torch.bfloat16 and _cpu_has_pairs()


def packing(dtype: torch.dtype, weight: Tensor | None = None) -> str:
    """The form that a weight for rows of that dtype is packed in: panels, pairs or rows. Default: one on a CPU."""
    if weight is not None and in_triton("linear", weight):
        return "rows"
    return "pairs" if has_pairs(dtype) else "panels"


def linear(x: Tensor, weight: LinearWeight, *, out: Tensor | None = None, own_bits: bool = True) -> Tensor:
    """x @ weight.T + bias -> [rows, out_features] of x's dtype, or `out`, which may also be float32.

    own_bits: a row's bits are its own, whatever rows are beside it. False leaves that to cuBLAS, for a weight on CUDA
    that is not quantized. Raises ValueError when a tensor breaks the contract.
    """
    if x.dtype != weight.dtype or x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous {weight.dtype} [rows, {weight.in_features}], got {x.dtype} {list(x.shape)}"
        )
    rows = x.shape[0]
    if out is None:
        out = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    elif (
        out.dtype not in (x.dtype, torch.float32) or out.shape != (rows, weight.out_features) or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous {x.dtype} or float32 [{rows}, {weight.out_features}], "
            f"got {out.dtype} {list(out.shape)}"
        )
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}")
    if weight._packing == "rows":
        _launch(x, weight, out, own_bits)
        return out
    if c_linear("tandem_linear", x, weight, out):
        raise MemoryError(f"no memory for {rows} rows of {weight.in_features} features")
    return out


def c_linear(op: str, x: Tensor, weight: LinearWeight, out: Tensor, *more: int | None) -> int:
    """Calls the weight's kind of the op, with the arguments that each begins with, and those that it has besides."""
    return library.call(
        op + _OPS[weight._packing],
        x.data_ptr(), weight.packed.data_ptr(), _address(weight.scale), _address(weight.offset), _address(weight.bias),
        out.data_ptr(), len(out), weight.in_features, weight.out_features, weight.group,
        CODES[x.dtype], _FORM_CODES.get(weight.form, CODES[weight.dtype]), CODES[weight.dtype], CODES[out.dtype],
        torch.get_num_threads(), *more,
    )  # fmt: skip


def _launch(x: Tensor, weight: LinearWeight, out: Tensor, own_bits: bool) -> None:
    from kernels.cuda import linear as cuda

    if not own_bits and weight.quantization is None:
        cuda.cublas(x, weight.packed, weight.bias, out)
        return
    x_scale = None
    if weight.quantization and weight.quantization.dynamic:
        wide, x = x, torch.empty_like(x, dtype=torch.int8)
        x_scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        cuda.quantize_rows(wide, x, x_scale)
    group = weight.quantization and weight.quantization.group
    parts = weight.packed, weight.scale, weight.offset, weight.bias
    cuda.linear(x, weight.form, *parts, out, group=group, x_scale=x_scale, of_outputs=weight.of_outputs)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch, in the dtype of its inputs."""
    return functional.linear(x, weight, bias)


def probe_row_invariance(weight: LinearWeight) -> None:
    """Checks at start-up that rows keep their bits among other numbers of rows, first or last in the batch.

    Raises RuntimeError naming the row counts that differ.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_PROBE_ROWS), weight.in_features, generator=generator).to(weight.packed.device, weight.dtype)
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


@functools.cache
def _cpu_has_pairs() -> bool:
    return library.instruction_set() == "AVX-512 BF16"


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
