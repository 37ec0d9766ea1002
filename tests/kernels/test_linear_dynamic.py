"""int8 linears whose rows become int8 too: integers on every side, so the bits of an exact reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import device
from kernels.kv_format import quantize_rows
from kernels.linear import LinearWeight, linear
from kernels.quantization import Integers, Quantization, quantize
from tests.kernels.rows import assert_rows_keep_their_bits

DYNAMIC = Quantization(8, dynamic=True)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
# none of the others is a whole number of words, of panels or of both
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs"), [(64, 576), (100, 64), (33, 71), (70, 600), (1, 8), (5, 9), (3, 1), (31, 1030)]
)


def make(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(outputs + inputs)
    return (torch.randn(outputs, inputs) / inputs**0.5 + 0.02).to(dtype), torch.randn(outputs).to(dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32; sums of integers in 64 bits."""
    x_values, x_scale = quantize_rows(x, "int8")
    values, scale, _ = quantize(weight, Quantization(8))
    y = (x_values.long() @ values.long().T).float() * scale.T * x_scale[:, None]
    return y if bias is None else y + bias.float()


@DTYPES
@SHAPES
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_has_the_bits_of_an_exact_reference(outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool) -> None:
    weight, bias = make(outputs, inputs, dtype)
    packed = LinearWeight(weight, bias if has_bias else None, DYNAMIC)
    for rows in (1, 2, 9, 13, 40, 260):  # strips of rows end at 240
        x = (torch.randn(rows, inputs) * 10 ** torch.linspace(-3, 3, rows)[:, None]).to(dtype)
        expected = reference(x, weight, bias if has_bias else None)
        assert torch.equal(linear(x, packed, out=torch.empty(rows, outputs)), expected)
        assert torch.equal(linear(x, packed), expected.to(dtype))


@DTYPES
@SHAPES
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    assert_rows_keep_their_bits(LinearWeight(*make(outputs, inputs, dtype), DYNAMIC), (*range(1, 15), 64, 241))


@DTYPES
def test_error_against_the_exact_product_is_bounded(dtype: torch.dtype) -> None:
    weight, _ = make(64, 576, dtype)
    packed, x = LinearWeight(weight, None, DYNAMIC), torch.randn(30, 576).to(dtype)
    exact = x.double() @ packed.dequantize().double().T
    error = (linear(x, packed, out=torch.empty(30, 64)).double() - exact).abs()
    # a number of a row is half a step of 127 off at most
    half_steps = x.double().abs().amax(1, keepdim=True) / 254
    assert (error <= half_steps * packed.dequantize().double().abs().sum(1) * (1 + 1e-6)).all()
    assert error.amax() < 0.02 * exact.abs().amax()
    assert error.amax() > 1e-4, "or rows were not rounded"


def test_the_longest_rows_do_not_overflow() -> None:
    inputs = 2**31 // 127**2
    packed = LinearWeight(torch.ones(2, inputs), None, DYNAMIC)
    x = torch.ones(3, inputs)
    x[1] = -1
    assert torch.equal(linear(x, packed), reference(x, torch.ones(2, inputs)))
    assert linear(x, packed)[0, 0] == -linear(x, packed)[1, 0] > inputs * 0.999
    with pytest.raises(ValueError, match=f"in_features must be {inputs} at most, got {inputs + 1}"):
        LinearWeight(torch.ones(1, inputs + 1), None, DYNAMIC)


def test_rows_of_zeros_and_of_what_is_no_number() -> None:
    weight, bias = make(40, 64, torch.float32)
    packed, x = LinearWeight(weight, bias, DYNAMIC), torch.randn(5, 64)
    good = linear(x, packed)
    x[0], x[1, 3], x[2, 63], x[3] = 0, torch.inf, torch.nan, 1e-35
    y = linear(x, packed)
    assert torch.equal(y[0], bias)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert torch.equal(y[3], bias), "too small for a scale"
    assert torch.equal(y[4], good[4])


@DTYPES
@SHAPES
def test_a_weight_comes_back_from_its_tensors(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight, bias = make(outputs, inputs, dtype)
    packed = LinearWeight(weight, bias, DYNAMIC)
    assert packed.num_bytes >= outputs * (inputs + 4)
    assert packed.description == "int8 fours, integer products, rows, symmetric, dynamic activations"
    again = LinearWeight.from_tensors(packed.tensors(), weight.shape, dtype)
    assert (again.quantization, again.description) == (DYNAMIC, packed.description)
    assert torch.equal(again.dequantize(), LinearWeight(weight, bias, Quantization(8)).dequantize())
    x = torch.randn(3, inputs).to(dtype)
    assert torch.equal(linear(x, again), linear(x, packed))


def test_integers_of_a_file_are_taken_as_they_are() -> None:
    values = torch.arange(-128, 128).to(torch.int8).repeat(3, 1)
    integers = Integers(8, values, torch.rand(3, 1))
    packed = LinearWeight.of_integers(integers, None, torch.bfloat16, dynamic=True)
    assert torch.equal(packed.dequantize(), integers.dequantize())
    x = torch.randn(4, 256).bfloat16()
    x_values, x_scale = quantize_rows(x, "int8")
    expected = (x_values.long() @ values.long().T).float() * integers.scale.T * x_scale[:, None]
    assert torch.equal(linear(x, packed, out=torch.empty(4, 3)), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, under the interpreter
@DTYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 71), (70, 576)])
def test_the_kernel_of_cuda_has_the_same_bits(
    interpreter: None, outputs: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = make(outputs, inputs, dtype)
    x = torch.randn(20, inputs).to(dtype)
    x[3], x[4, 0], x[5] = 0, torch.inf, 1e-36
    of_triton = linear(x, LinearWeight(weight, bias, DYNAMIC), out=torch.empty(20, outputs))
    monkeypatch.setattr(device, "INTERPRETED", False)
    of_c = linear(x, LinearWeight(weight, bias, DYNAMIC), out=torch.empty(20, outputs))
    assert torch.equal(of_triton.nan_to_num(7), of_c.nan_to_num(7))
    assert of_c[4].isnan().all()


def test_broken_contracts_are_refused() -> None:
    for wrong in ({"bits": 4}, {"group": 32}, {"symmetric": False}, {"floating": True}):
        with pytest.raises(ValueError, match="dynamic activations need a symmetric int8 weight"):
            Quantization(**{"bits": 8, "dynamic": True} | wrong)  # pyright: ignore[reportArgumentType]
