import pytest
import torch

from kernels.kv_format import ELEMENTS, GREATEST, KvFormat, quantize_rows, widen_rows


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_elements_and_scales_fill_a_block_and_share_no_byte(dtype):
    form = KvFormat(dtype, num_layers=2, num_kv_heads=3, head_dim=8, block_tokens=4)
    pool = torch.zeros(5, form.block_bytes, dtype=torch.uint8)
    form.elements(pool).view(torch.uint8).add_(1)
    scales = form.scales(pool)
    assert (scales is None) == (dtype not in ("int8", "fp8")) == (not form.quantized)
    if scales is not None:
        assert scales.shape == (5, 2, 2, 3, 4)
        scales.copy_(torch.full(scales.shape, 0x01010101, dtype=torch.int32).view(torch.float32))
    assert torch.equal(pool, torch.ones_like(pool))
    assert form.elements(pool).shape == (5, 2, 2, 3, 4, 8)
    assert form.elements(pool).dtype == ELEMENTS[dtype]


@pytest.mark.parametrize("dtype", GREATEST)
def test_rows_are_rounded_to_the_nearest(dtype):
    torch.manual_seed(0)
    rows = torch.randn(300, 64) * torch.logspace(-6, 6, 300).unsqueeze(1)
    rows[7] = 0
    rows[8] = 2.0**-101
    elements, scales = quantize_rows(rows, dtype)
    widened = widen_rows(elements, scales, dtype)
    most = rows.abs().amax(-1, keepdim=True)
    # half a step of integers; of e4m3 half of the last of 3 bits, or of the least number there is
    bound = (
        most / 254 + 2.0**-101 if dtype == "int8" else torch.maximum(rows.abs() / 16, most / 448 * 2**-10 + 2.0**-101)
    )
    assert ((widened - rows).abs() <= bound * 1.001).all()
    assert torch.equal(widened[7:9], torch.zeros(2, 64))
    assert torch.equal(scales[7:9], torch.zeros(2))


def test_a_dtype_that_no_block_has_is_refused():
    with pytest.raises(ValueError, match="'float64' is none of float32, bfloat16, float16, int8, fp8"):
        KvFormat("float64", 1, 1, 8, 16)
