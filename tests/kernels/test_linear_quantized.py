"""Quantized linears: how near the integers are, their products against float64, and the same bits for a row as ever."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import linear as module
from kernels.linear import (
    LinearWeight,
    has_pairs,
    linear,
    linear_reference,
)
from kernels.quantization import Quantization
from tests.kernels.rows import assert_rows_keep_their_bits

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
BITS = pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
KINDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "offsets"])
# None = per row; 288 = longer than a block of sums and no multiple of it; 71, 9 and 1 are no whole words of int4
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [
        (64, 576, 64),
        (100, 64, 8),
        (33, 96, 32),
        (40, 576, 288),
        (70, 600, None),
        (33, 71, None),
        (1, 8, 8),
        (5, 9, None),
        (3, 1, None),
    ],
)


def make(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(outputs + inputs)
    # not around zero, so that symmetric integers and those with offsets differ
    return (torch.randn(outputs, inputs) / inputs**0.5 + 0.02).to(dtype), torch.randn(outputs).to(dtype)


@BITS
@KINDS
@SHAPES
@DTYPES
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_matches_the_dequantized_weight(
    outputs: int, inputs: int, group: int | None, bits: int, symmetric: bool, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, bias = make(outputs, inputs, dtype)
    packed = LinearWeight(weight, bias if has_bias else None, Quantization(bits, group, symmetric))
    x = torch.randn(19, inputs).to(dtype)
    y = linear(x, packed, out=torch.empty(19, outputs))
    expected = linear_reference(x.double(), packed.dequantize().double(), bias.double() if has_bias else None)
    # of what is summed: int4 sums integers around 8
    bound = 4e-7 * linear_reference(x.double().abs(), packed.dequantize().double().abs() + 0.05).amax()
    assert (y - expected).abs().amax() < bound
    assert torch.equal(linear(x, packed), y.to(dtype))
    assert torch.equal(linear(x[:2], packed), y[:2].to(dtype))


@BITS
@KINDS
@SHAPES
@DTYPES
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    outputs: int, inputs: int, group: int | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    packed = LinearWeight(*make(outputs, inputs, dtype), Quantization(bits, group, symmetric))
    assert_rows_keep_their_bits(packed, (*range(1, 18), 64, 241))


@BITS
@KINDS
@SHAPES
def test_every_weight_is_the_nearest_multiple(
    outputs: int, inputs: int, group: int | None, bits: int, symmetric: bool
) -> None:
    weight, _ = make(outputs, inputs)
    made = LinearWeight(weight, None, Quantization(bits, group, symmetric)).dequantize()
    groups = weight.unflatten(1, (-1, group or inputs))
    if symmetric:
        scale = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        steps = 15 if bits == 4 else 254  # int8 goes without -128
        scale = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / steps
    error = (made - weight).abs().unflatten(1, (-1, group or inputs))
    assert made.dtype == torch.float32
    assert (error <= scale * 0.5001 + 1e-7).all()
    if inputs > 32:
        assert error.amax() > 0.3 * scale.amin(), "or nothing was rounded"


@BITS
def test_offsets_use_every_integer(bits: int) -> None:
    weight = torch.linspace(3, 7, 16 if bits == 4 else 255)[None].repeat(2, 1)
    made = LinearWeight(weight, None, Quantization(bits, symmetric=False)).dequantize()
    torch.testing.assert_close(made, weight, rtol=0, atol=1e-6)
    signed = LinearWeight(weight, None, Quantization(bits)).dequantize()
    assert (signed - weight).abs().amax() > 0.005


@BITS
@KINDS
def test_zeros_constants_and_extreme_values(bits: int, symmetric: bool) -> None:
    quantization = Quantization(bits, 8, symmetric)
    weight = torch.randn(6, 16)
    weight[0] = 0
    weight[1, 8:] = 0
    weight[2] = -0.3
    weight[3] *= 1e30
    weight[4] *= 1e-30
    weight[5] *= 1e-42  # denormal, as are their scales
    made = LinearWeight(weight, None, quantization).dequantize()
    assert made.isfinite().all()
    assert not made[0].any()
    assert not made[1, 8:].any()
    torch.testing.assert_close(made[2], weight[2], rtol=1e-6, atol=0)
    for row in (3, 4):
        limit = weight[row].abs().amax() / (2 ** (bits - 1) - 1)
        assert (made[row] - weight[row]).abs().amax() <= limit * 0.5001
    assert (made[5] - weight[5]).abs().amax() < 1e-41
    packed = LinearWeight(weight, None, quantization)
    x = torch.randn(11, 16)
    expected = linear_reference(x.double(), made.double())
    for rows in (1, 11):
        y = linear(x[:rows], packed)
        assert not y[:, 0].any() or not symmetric
        torch.testing.assert_close(y.double(), expected[:rows], rtol=1e-4, atol=1e-5)


def test_the_greatest_weights_have_a_scale() -> None:
    weight = torch.tensor([[3e38, -3e38, 1e38, 0, 0, 0, 0, 0]])
    for bits in (8, 4):
        for symmetric in (True, False):
            made = LinearWeight(weight, None, Quantization(bits, symmetric=symmetric)).dequantize()
            assert made.isfinite().all()
            torch.testing.assert_close(made[0, :2], weight[0, :2], rtol=0.08, atol=0)


def test_a_step_reads_half_and_a_quarter_of_the_bytes() -> None:
    weight, bias = make(64, 512, torch.bfloat16)
    assert LinearWeight(weight, None, Quantization(8)).num_bytes == 64 * 512 + 4 * 64
    assert LinearWeight(weight, bias, Quantization(8, 64, False)).num_bytes == 64 * 512 + 2 * 4 * 64 * 8 + 2 * 64
    assert LinearWeight(weight, None, Quantization(4, 64)).num_bytes == 64 * 512 // 2 + 4 * 64 * 8
    assert LinearWeight(weight.float()).num_bytes == 64 * 512 * 4
    assert LinearWeight(weight, None, Quantization(4, 64)).description == (
        f"int4 {LinearWeight(weight).description.removeprefix('bfloat16 ')}, groups of 64, symmetric"
    )


@BITS
@KINDS
@SHAPES
def test_a_weight_comes_back_from_its_tensors(
    outputs: int, inputs: int, group: int | None, bits: int, symmetric: bool
) -> None:
    weight, bias = make(outputs, inputs)
    packed = LinearWeight(weight, bias, Quantization(bits, group, symmetric))
    stored = packed.tensors()
    assert set(stored) <= set(LinearWeight.FIELDS)
    again = LinearWeight.from_tensors(stored, (outputs, inputs), weight.dtype)
    assert again.quantization == packed.quantization
    assert (again.group, again.description, again.num_bytes) == (packed.group, packed.description, packed.num_bytes)
    assert again.packed.data_ptr() == packed.packed.data_ptr(), "over the same memory"
    assert torch.equal(again.dequantize(), packed.dequantize())
    x = torch.randn(3, inputs)
    assert torch.equal(linear(x, again), linear(x, packed))
    for lacking in ("packed", "how"):
        with pytest.raises(KeyError, match=lacking):
            parts = {field: part for field, part in stored.items() if field != lacking}
            LinearWeight.from_tensors(parts, (outputs, inputs), weight.dtype)


@pytest.mark.skipif(not has_pairs(torch.bfloat16), reason="this CPU has no dot products of bfloat16 pairs")
@BITS
@KINDS
@SHAPES
def test_products_of_pairs_are_those_of_panels(
    outputs: int, inputs: int, group: int | None, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = *make(outputs, inputs, torch.bfloat16), Quantization(bits, group, symmetric)
    of_pairs = LinearWeight(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_cpu_has_pairs", lambda: False)
        of_panels = LinearWeight(*arguments)
    assert torch.equal(of_pairs.dequantize(), of_panels.dequantize())
    for rows in (1, 3, 8, 9, 30):
        x = torch.randn(rows, inputs).bfloat16()
        ours, theirs = (linear(x, packed, out=torch.empty(rows, outputs)) for packed in (of_pairs, of_panels))
        if bits == 8:
            assert torch.equal(ours, theirs)
        else:  # where integers are summed around 8
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_broken_contracts_are_refused() -> None:
    weight = torch.randn(8, 72)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 5"):
        Quantization(5)  # pyright: ignore[reportArgumentType]
    for group in (0, -8, 12):
        with pytest.raises(ValueError, match=f"group must be a multiple of 8 input features, got {group}"):
            Quantization(4, group)
    with pytest.raises(ValueError, match="72 input features cannot be cut into groups of 64"):
        LinearWeight(weight, None, Quantization(4, 64))
    with pytest.raises(ValueError, match="float32 panels, float32 products: not quantized"):
        LinearWeight(weight).dequantize()
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 72).bfloat16(), LinearWeight(weight, None, Quantization(8)))
