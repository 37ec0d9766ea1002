"""Quantized linears: how near the numbers are, their products against float64, and the same bits for a row as ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import linear as module
from kernels.linear import (
    LinearWeight,
    has_pairs,
    linear,
    linear_reference,
)
from kernels.quantization import Integers, Quantization, floats_of
from tests.kernels.rows import assert_rows_keep_their_bits

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
KINDS = (
    Quantization(8),
    Quantization(8, symmetric=False),
    Quantization(4),
    Quantization(4, symmetric=False),
    Quantization(8, floating=True),
    Quantization(6, floating=True),
)
OF_INTEGERS = tuple(kind for kind in KINDS if not kind.floating)


def kinds(*chosen: Quantization) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", chosen, ids=lambda kind: kind.form + " offsets" * (not kind.symmetric))


# None = per row; 288 = longer than a block of sums and no multiple of it; 71, 9 and 1 are no whole words
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [
        (64, 576, 64),
        (100, 64, 8),
        (33, 96, 32),
        (40, 576, 288),
        (34, 60, 12),
        (9, 852, 284),
        (7, 18, 9),
        (33, 71, 1),
        (70, 600, None),
        (33, 71, None),
        (1, 8, 8),
        (5, 9, None),
        (3, 1, None),
    ],
)
OTHER_GROUPS = {12, 284, 9, 1}  # of which kernels know nothing but that they are filled up


def make(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(outputs + inputs)
    # not around zero, so that symmetric integers and those with offsets differ
    return (torch.randn(outputs, inputs) / inputs**0.5 + 0.02).to(dtype), torch.randn(outputs).to(dtype)


@kinds(*KINDS)
@SHAPES
@DTYPES
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_matches_the_dequantized_weight(
    outputs: int, inputs: int, group: int | None, kind: Quantization, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, bias = make(outputs, inputs, dtype)
    packed = LinearWeight(weight, bias if has_bias else None, replace(kind, group=group))
    x = torch.randn(19, inputs).to(dtype)
    y = linear(x, packed, out=torch.empty(19, outputs))
    expected = linear_reference(x.double(), packed.dequantize().double(), bias.double() if has_bias else None)
    # of what is summed: int4 sums integers around 8
    bound = 4e-7 * linear_reference(x.double().abs(), packed.dequantize().double().abs() + 0.05).amax()
    assert (y - expected).abs().amax() < bound
    assert torch.equal(linear(x, packed), y.to(dtype))
    assert torch.equal(linear(x[:2], packed), y[:2].to(dtype))


@kinds(*KINDS)
@SHAPES
@DTYPES
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    outputs: int, inputs: int, group: int | None, kind: Quantization, dtype: torch.dtype
) -> None:
    packed = LinearWeight(*make(outputs, inputs, dtype), replace(kind, group=group))
    every = group not in OTHER_GROUPS and dtype != torch.float16
    assert_rows_keep_their_bits(packed, (*range(1, 18), 64, 241) if every else (1, 5, 9, 241))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    outputs=st.integers(1, 70),
    group=st.integers(1, 40) | st.sampled_from([64, 128, 255, 256, 257, 300]),
    groups=st.integers(1, 6),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_every_number_is_within_half_a_step_of_its_weight(
    kind: Quantization, outputs: int, group: int, groups: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, groups * group, generator=generator) * 2.0**exponent
    weight += torch.randn(outputs, 1, generator=generator) * 2.0**exponent
    made = LinearWeight(weight, None, replace(kind, group=None if groups == 1 else group)).dequantize()
    error = (made.double() - weight.double()).abs().unflatten(1, (groups, group))
    of_group = weight.double().unflatten(1, (groups, group))
    most = of_group.abs().amax(2, keepdim=True)
    if kind.floating:
        numbers = floats_of(torch.arange(2 ** (kind.bits - 1) - (kind.bits == 8)).to(torch.int8), kind.form).double()
        scale = most / numbers[-1]
        above = torch.bucketize(of_group.abs() / scale * (1 - 1e-6), numbers).clamp(1, len(numbers) - 1)
        step = (numbers[above] - numbers[above - 1]) * scale
    elif kind.symmetric:
        step = most / (2 ** (kind.bits - 1) - 1)
    else:  # int8 goes without -128
        step = (of_group.amax(2, keepdim=True) - of_group.amin(2, keepdim=True)) / (15 if kind.bits == 4 else 254)
    # a scale and an offset are float32, and so is their product with a number, and the sum
    assert (error <= 0.5 * step + 2.0**-22 * most).all()


@kinds(*OF_INTEGERS)
def test_offsets_use_every_integer(kind: Quantization) -> None:
    weight = torch.linspace(3, 7, 16 if kind.bits == 4 else 255)[None].repeat(2, 1)
    made = LinearWeight(weight, None, kind).dequantize()
    assert (made - weight).abs().amax() < 1e-6 or kind.symmetric
    assert (made - weight).abs().amax() > 0.005 or not kind.symmetric


@kinds(*KINDS)
def test_zeros_constants_and_extreme_values(kind: Quantization) -> None:
    how = replace(kind, group=8)
    weight = torch.randn(6, 16)
    weight[0] = 0
    weight[1, 8:] = 0
    weight[2] = -0.3
    weight[3] *= 1e30
    weight[4] *= 1e-30
    weight[5] *= 1e-42  # denormal, as are their scales
    made = LinearWeight(weight, None, how).dequantize()
    assert made.isfinite().all()
    assert not made[0].any()
    assert not made[1, 8:].any()
    torch.testing.assert_close(made[2], weight[2], rtol=1e-6, atol=0)
    for row in (3, 4):
        half_steps = {"int8": 254, "int4": 14, "fp8": 28, "fp6": 14}[kind.form]  # of the greatest number
        assert (made[row] - weight[row]).abs().amax() <= weight[row].abs().amax() / half_steps * 1.0002
    assert (made[5] - weight[5]).abs().amax() < 1e-41
    packed = LinearWeight(weight, None, how)
    x = torch.randn(11, 16)
    expected = linear_reference(x.double(), made.double())
    for rows in (1, 11):
        y = linear(x[:rows], packed)
        assert not y[:, 0].any() or not kind.symmetric
        torch.testing.assert_close(y.double(), expected[:rows], rtol=1e-4, atol=1e-5)


@kinds(*KINDS)
def test_the_greatest_weights_have_a_scale(kind: Quantization) -> None:
    weight = torch.tensor([[3e38, -3e38, 1e38, 0, 0, 0, 0, 0]])
    made = LinearWeight(weight, None, kind).dequantize()
    assert made.isfinite().all()
    torch.testing.assert_close(made[0, :2], weight[0, :2], rtol=0.08, atol=0)


def test_a_step_reads_so_many_bytes_less() -> None:
    weight, bias = make(64, 512, torch.bfloat16)
    assert LinearWeight(weight, None, Quantization(8)).num_bytes == 64 * 512 + 4 * 64
    assert LinearWeight(weight, bias, Quantization(8, 64, False)).num_bytes == 64 * 512 + 2 * 4 * 64 * 8 + 2 * 64
    assert LinearWeight(weight, None, Quantization(4, 64)).num_bytes == 64 * 512 // 2 + 4 * 64 * 8
    assert LinearWeight(weight, None, Quantization(8, floating=True)).num_bytes == 64 * 512 + 4 * 64
    assert LinearWeight(weight, None, Quantization(6, floating=True)).num_bytes == 64 * 512 * 3 // 4 + 4 * 64
    assert LinearWeight(weight.float()).num_bytes == 64 * 512 * 4
    assert LinearWeight(weight, None, Quantization(4, 64)).description == (
        f"int4 {LinearWeight(weight).description.removeprefix('bfloat16 ')}, groups of 64, symmetric"
    )


@kinds(*KINDS)
@SHAPES
def test_a_weight_comes_back_from_its_tensors(outputs: int, inputs: int, group: int | None, kind: Quantization) -> None:
    weight, bias = make(outputs, inputs)
    packed = LinearWeight(weight, bias, replace(kind, group=group))
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
        parts = {field: part for field, part in stored.items() if field != lacking}
        with pytest.raises(KeyError, match=lacking):
            LinearWeight.from_tensors(parts, (outputs, inputs), weight.dtype)


@kinds(*OF_INTEGERS)
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_integers_of_a_file_are_taken_as_they_are(
    outputs: int, inputs: int, group: int | None, kind: Quantization, dtype: torch.dtype
) -> None:
    torch.manual_seed(inputs)
    top, groups = 2 ** (kind.bits - 1), inputs // (group or inputs)
    values = torch.randint(-top + (kind.bits == 8), top, (outputs, inputs), dtype=torch.int8)
    scale, offset = torch.rand(outputs, groups), None if kind.symmetric else torch.rand(outputs, groups)
    packed = LinearWeight.of_integers(Integers(kind.bits, values, scale, offset), None, dtype)
    expected = values.unflatten(1, (groups, -1)) * scale[:, :, None]
    assert torch.equal(packed.dequantize(), (expected if offset is None else expected + offset[:, :, None]).flatten(1))


@DTYPES
@pytest.mark.parametrize("group", [None, 32])
def test_a_file_may_have_the_least_integer_too(dtype: torch.dtype, group: int | None) -> None:
    values = torch.arange(-128, 128).to(torch.int8).repeat(40, 1)
    integers = Integers(8, values, torch.rand(40, 256 // (group or 256)))
    packed = LinearWeight.of_integers(integers, None, dtype)
    assert torch.equal(packed.dequantize(), integers.dequantize())
    x = torch.zeros(12, 256, dtype=dtype)
    x[:, 0] = torch.arange(1, 13)
    expected = x.float() @ integers.dequantize().T
    again = LinearWeight.from_tensors(packed.tensors(), values.shape, dtype)
    for weight, rows in ((packed, 12), (packed, 1), (again, 12), (again, 1)):
        y = linear(x[:rows], weight, out=torch.empty(rows, 40))
        torch.testing.assert_close(y, expected[:rows], rtol=1e-6, atol=0)
    assert_rows_keep_their_bits(packed, (1, 5, 9))


@pytest.mark.skipif(not has_pairs(torch.bfloat16), reason="this CPU has no dot products of bfloat16 pairs")
@kinds(*KINDS)
@SHAPES
def test_products_of_pairs_are_those_of_panels(
    outputs: int, inputs: int, group: int | None, kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = *make(outputs, inputs, torch.bfloat16), replace(kind, group=group)
    of_pairs = LinearWeight(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_cpu_has_pairs", lambda: False)
        of_panels = LinearWeight(*arguments)
    assert torch.equal(of_pairs.dequantize(), of_panels.dequantize())
    for rows in (1, 3, 8, 9, 30):
        x = torch.randn(rows, inputs).bfloat16()
        ours, theirs = (linear(x, packed, out=torch.empty(rows, outputs)) for packed in (of_pairs, of_panels))
        if kind.bits != 4:
            assert torch.equal(ours, theirs)
        else:  # where integers are summed around 8
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_broken_contracts_are_refused() -> None:
    weight = torch.randn(8, 72)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 5"):
        Quantization(5)  # pyright: ignore[reportArgumentType]
    for group in (0, -8):
        with pytest.raises(ValueError, match=f"group must be 1 input feature or more, got {group}"):
            Quantization(4, group)
    with pytest.raises(ValueError, match="72 input features cannot be cut into groups of 64"):
        LinearWeight(weight, None, Quantization(4, 64))
    with pytest.raises(ValueError, match="float32 panels, float32 products: not quantized"):
        LinearWeight(weight).dequantize()
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 72).bfloat16(), LinearWeight(weight, None, Quantization(8)))
