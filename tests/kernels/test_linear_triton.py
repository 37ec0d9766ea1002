"""The Triton linears: each form of a weight against float64, and the same bits for a row in tiles of every size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.kv_format import quantize_rows, widen_rows
from kernels.linear import LinearWeight, linear, linear_reference, probe_row_invariance
from kernels.quantization import Integers, Quantization, floats_of

FORMS = pytest.mark.parametrize(
    "how",
    [
        None,
        Quantization(8),
        pytest.param(Quantization(8, 32, symmetric=False), marks=pytest.mark.slow),
        Quantization(8, dynamic=True),
        Quantization(4),
        pytest.param(Quantization(4, symmetric=False), marks=pytest.mark.slow),
        Quantization(4, 8, symmetric=False),
        pytest.param(Quantization(4, 32), marks=pytest.mark.slow),
        Quantization(8, floating=True),
        pytest.param(Quantization(8, 32, floating=True), marks=pytest.mark.slow),
        Quantization(6, floating=True),
        pytest.param(Quantization(6, 32, floating=True), marks=pytest.mark.slow),
    ],
    ids=lambda how: "plain" if how is None else f"{how.form} {how.group} {how.symmetric} {how.dynamic}",
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
# the last two are summed in ranges; none of the others is a whole number of tiles
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs", "counts"),
    [
        (33, 96, (1, 18, 65)),
        (20, 544, (2, 17)),
        pytest.param(130, 544, (1, 15, 63, 127), marks=pytest.mark.slow),
        pytest.param(64, 1024, (1, 16, 64, 129), marks=pytest.mark.slow),
    ],
)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("interpreter")
    return "cpu"


def make(outputs: int, inputs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(outputs + inputs)
    # not around zero, so that symmetric integers and those with offsets differ
    weight = torch.randn(outputs, inputs) / inputs**0.5 + 0.02
    return weight.to(device, dtype), torch.randn(outputs).to(device, dtype)


def multiplied(weight: Tensor, packed: LinearWeight) -> Tensor:
    """The numbers that are multiplied: of groups rounded to x's dtype."""
    if packed.quantization is None:
        return weight.double()
    made = packed.dequantize()
    grouped = packed.quantization.group is not None or packed.offset is not None
    return (made.to(packed.dtype) if grouped else made).double()


@FORMS
@SHAPES
@DTYPES
def test_matches_the_reference(
    device: str, outputs: int, inputs: int, counts: tuple[int, ...], how: Quantization | None, dtype: torch.dtype
) -> None:
    weight, bias = make(outputs, inputs, dtype, device)
    packed = LinearWeight(weight, bias, how)
    for rows in counts:
        x = torch.randn(rows, inputs).to(device, dtype)
        y = linear(x, packed, out=torch.full((rows, outputs), torch.nan, device=device))
        wide = x.double()
        if how and how.dynamic:
            wide = widen_rows(*quantize_rows(x, "int8"), "int8").double()
        exact = linear_reference(wide, multiplied(weight, packed), bias.double())
        assert (y - exact).abs().amax() < 4e-6 * (1 + exact.abs().amax())
        assert torch.equal(linear(x, packed), y.to(dtype))


@FORMS
@SHAPES
def test_a_row_keeps_its_bits_in_tiles_of_every_size(
    device: str, outputs: int, inputs: int, counts: tuple[int, ...], how: Quantization | None
) -> None:
    packed = LinearWeight(*make(outputs, inputs, torch.bfloat16, device), how)
    x = torch.randn(max(counts) + 1, inputs).to(device, torch.bfloat16)
    whole = linear(x, packed)
    for rows in counts:
        assert torch.equal(linear(x[:rows], packed), whole[:rows]), rows
        assert torch.equal(linear(x[-rows:], packed), whole[-rows:]), rows


@pytest.mark.parametrize("how", [None, Quantization(8), Quantization(4, 32, symmetric=False)])
def test_ranges_side_by_side_and_in_turn_have_the_same_bits(
    device: str, how: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.cuda import linear as cuda

    packed = LinearWeight(*make(40, 1024, torch.bfloat16, device), how)
    x = torch.randn(20, 1024).to(device, torch.bfloat16)
    side_by_side = linear(x, packed)
    monkeypatch.setattr(cuda, "_FEW_PROGRAMS", 0)
    assert torch.equal(linear(x, packed), side_by_side)


@pytest.mark.parametrize("how", [None, Quantization(4, 32, symmetric=False)])
def test_some_outputs_have_the_bits_that_they_have_among_all(
    device: str, how: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks have them: a weight of fewer outputs would be summed in more ranges."""
    from kernels.cuda import linear as cuda

    monkeypatch.setattr(cuda, "_PROGRAMS", 2)
    weight, bias = make(128, 1024, torch.float32, device)
    x = torch.randn(3, 1024).to(device)
    whole = linear(x, LinearWeight(weight, bias, how))
    alone = LinearWeight(weight[64:], bias[64:], how)
    assert not torch.equal(linear(x, alone), whole[:, 64:])
    assert torch.equal(linear(x, alone.as_part_of(128)), whole[:, 64:])


@pytest.mark.parametrize("rows", [1, 40])
def test_bits_that_may_depend_on_others_are_left_to_cublas(device: str, rows: int) -> None:
    weight, bias = make(96, 64, torch.bfloat16, device)
    packed = LinearWeight(weight, bias)
    x = torch.randn(rows, 64).to(device, torch.bfloat16)
    y = linear(x, packed, out=torch.full_like(x[:, :1].expand(-1, 96).contiguous(), torch.nan), own_bits=False)
    exact = linear_reference(x.double(), weight.double(), bias.double())
    assert (y - exact).abs().amax() < 0.02 * (1 + exact.abs().amax())
    quantized = LinearWeight(weight, bias, Quantization(8))
    assert torch.equal(linear(x, quantized, own_bits=False), linear(x, quantized))


@pytest.mark.parametrize("group", [12, 15, 1])
@pytest.mark.parametrize(
    "kind",
    [Quantization(8, symmetric=False), Quantization(4, symmetric=False), Quantization(6, floating=True)],
    ids=lambda kind: kind.form,
)
def test_groups_of_any_divisor(device: str, kind: Quantization, group: int) -> None:
    weight, bias = make(33, 180, torch.bfloat16, device)
    packed = LinearWeight(weight, bias, replace(kind, group=group))
    x = torch.randn(18, 180).to(device, torch.bfloat16)
    y = linear(x, packed, out=torch.empty(18, 33, device=device))
    exact = linear_reference(x.double(), multiplied(weight, packed), bias.double())
    assert (y - exact).abs().amax() < 4e-6 * (1 + exact.abs().amax())
    assert torch.equal(linear(x[:2], packed), y[:2].bfloat16())


@FORMS
def test_a_weight_comes_back_from_its_tensors(device: str, how: Quantization | None) -> None:
    weight, bias = make(20, 96, torch.bfloat16, device)
    packed = LinearWeight(weight, bias, how)
    again = LinearWeight.from_tensors(packed.tensors(), weight.shape, weight.dtype)
    assert again.quantization == how
    assert (again.description, again.num_bytes) == (packed.description, packed.num_bytes)
    x = torch.randn(2, 96).to(device, torch.bfloat16)
    assert torch.equal(linear(x, again), linear(x, packed))


def test_integers_of_a_file_are_taken_as_they_are(device: str) -> None:
    values = torch.randint(-8, 8, (20, 64), dtype=torch.int8, device=device)
    scale = torch.rand(20, 2, device=device)
    packed = LinearWeight.of_integers(Integers(4, values, scale), None, torch.bfloat16)
    assert torch.equal(packed.dequantize(), (values.unflatten(1, (2, 32)) * scale[:, :, None]).flatten(1))
    assert packed.num_bytes == 20 * 32 + 4 * 40


@pytest.mark.parametrize(("bits", "greatest"), [(8, 448.0), (6, 28.0)])
def test_small_floats_are_the_nearest_there_are(device: str, bits: int, greatest: float) -> None:
    how = Quantization(bits, floating=True)  # pyright: ignore[reportArgumentType]
    numbers = floats_of(torch.arange(2 ** (bits - 1) - (bits == 8)).to(torch.int8), how.form)
    assert numbers[-1] == greatest
    assert (numbers.diff() > 0).all()
    if bits == 8:
        codes = torch.arange(127, dtype=torch.uint8)
        assert torch.equal(numbers, codes.view(torch.float8_e4m3fn).float())
    # with the greatest number in the row the scale is 1, or nearly
    weight = torch.cat([torch.linspace(-greatest, greatest, 4095), torch.zeros(1)])[None]
    made = LinearWeight(weight, None, how).dequantize()
    assert torch.equal(made, weight.clone().apply_(lambda v: nearest(v, numbers)))
    if bits == 8:
        assert torch.equal(made, weight.to(torch.float8_e4m3fn).float())


def nearest(value: float, numbers: Tensor) -> float:
    """Of two, the one whose last bit is zero."""
    distances = (numbers - abs(value)).abs()
    best = (distances == distances.min()).nonzero().flatten().tolist()
    return float(numbers[min(best, key=lambda i: i % 2)]) * (-1 if value < 0 else 1)


def test_the_probe_passes(device: str) -> None:
    probe_row_invariance(LinearWeight(*make(64, 128, torch.bfloat16, device)))


def test_broken_contracts_are_refused() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 6 of a float"):
        Quantization(4, floating=True)
    with pytest.raises(ValueError, match="floats are symmetric"):
        Quantization(8, symmetric=False, floating=True)
    with pytest.raises(ValueError, match="dynamic activations need"):
        Quantization(8, 32, dynamic=True)
