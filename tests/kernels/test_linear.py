"""Linear against its float64 reference, and the same bits for a row among any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import linear as module
from kernels.linear import LinearWeight, linear, linear_reference, probe_row_invariance

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = pytest.mark.parametrize(
    ("outputs", "inputs"), [(576, 576), (960, 576), (576, 1536), (33, 71), (1, 8), (1000, 64)]
)


def make(outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(outputs + inputs)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    return weight, torch.randn(outputs).to(dtype) if bias else None


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_matches_the_reference(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight, offset = make(outputs, inputs, dtype, bias)
    packed = LinearWeight(weight, offset)
    x = torch.randn(19, inputs).to(dtype)
    y = linear(x, packed)
    assert y.dtype == dtype
    assert y.shape == (19, outputs)
    expected = linear_reference(x.double(), weight.double(), None if offset is None else offset.double())
    tolerance = 5e-6 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_row_keeps_its_bits_among_others_and_on_any_number_of_threads(
    outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    packed = LinearWeight(*make(outputs, inputs, dtype, bias))
    probe_row_invariance(packed)
    x = torch.randn(256, inputs).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear(x, packed)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64, 100, 241, 256):
                assert torch.equal(linear(x[:rows], packed), whole[:rows]), (threads, rows)
                assert torch.equal(linear(x[-rows:], packed), whole[-rows:]), (threads, rows)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_rounds_the_float32_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_avx512_bf16", lambda: False)
    weight, bias = make(48, 600, torch.bfloat16, True)
    packed = LinearWeight(weight, bias)
    assert bias is not None
    wide = LinearWeight(weight.float(), bias.float())
    for rows in (1, 5, 30):
        x = torch.randn(rows, 600).bfloat16()
        expected = linear(x.float(), wide)
        assert torch.equal(linear(x, packed), expected.bfloat16())
        assert torch.equal(linear(x, packed, out=torch.empty(rows, 48)), expected)


def test_onednn_computes_the_same_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CPUs with AVX-512 BF16 run, here in float32 unless this is one."""
    monkeypatch.setattr(module, "_has_avx512_bf16", lambda: True)
    weight, bias = make(48, 600, torch.bfloat16, True)
    try:
        packed = LinearWeight(weight, bias)
    except RuntimeError as error:
        pytest.skip(f"oneDNN has no packed bfloat16 weights on this CPU: {error}")
    assert not packed.recordable
    probe_row_invariance(packed)


def test_the_probe_names_the_row_counts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = LinearWeight(*make(16, 16, torch.float32, False))

    def depends_on_rows(x: Tensor, weight: LinearWeight) -> Tensor:
        return linear(x, weight) + (1e-3 if len(x) in (2, 5) else 0)

    monkeypatch.setattr(module, "linear", depends_on_rows)
    with pytest.raises(RuntimeError, match=r"other bits for \[2, 5\] rows"):
        probe_row_invariance(packed)


def test_broken_contracts_are_refused() -> None:
    weight = torch.randn(8, 16)
    packed = LinearWeight(weight)
    with pytest.raises(ValueError, match="weight must be"):
        LinearWeight(weight.double())
    with pytest.raises(ValueError, match="bias must be"):
        LinearWeight(weight, torch.randn(9))
    with pytest.raises(ValueError, match="runs on: cpu"):
        LinearWeight(weight.to("meta"))
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 15), packed)
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.randn(2, 16).bfloat16(), packed)
    with pytest.raises(ValueError, match="out must be"):
        linear(torch.randn(2, 16), packed, out=torch.empty(2, 9))
    with pytest.raises(ValueError, match="out must be"):
        linear(torch.randn(2, 16), packed, out=torch.empty(2, 8).bfloat16())
