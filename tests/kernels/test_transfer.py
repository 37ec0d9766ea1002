"""Rows moved between pools against plain torch: the same bits, and not a byte elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.kv_format import ELEMENTS, GREATEST, LEAST, KvFormat, quantize_rows
from kernels.linear import LinearWeight, linear
from kernels.transfer import transfer_tokens, transfer_tokens_reference

TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
SOURCE = pytest.mark.parametrize("source_dtype", ELEMENTS)
TARGET = pytest.mark.parametrize("target_dtype", ELEMENTS)
POISON = 0xA5
# numpy's, of the interpreter: what is too large for float16 becomes infinity, as it should
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def filled(form: KvFormat, num_blocks: int) -> Tensor:
    """A pool of rows of very different sizes."""
    rows = torch.randn(num_blocks, form.num_layers, 2, form.num_kv_heads, form.block_tokens, form.head_dim)
    return pool_of(form, rows * torch.exp(4 * torch.randn(rows.shape[:-1])).unsqueeze(-1))


def pool_of(form: KvFormat, rows: Tensor) -> Tensor:
    """rows: [blocks, layers, 2, heads, block_tokens, head_dim] float32."""
    pool = torch.empty(rows.shape[0], form.block_bytes, dtype=torch.uint8)
    scales = form.scales(pool)
    if scales is None:
        form.elements(pool).copy_(rows)
    else:
        elements, of_rows = quantize_rows(rows, form.dtype)
        form.elements(pool).copy_(elements)
        scales.copy_(of_rows)
    return pool


def poisoned(form: KvFormat, num_blocks: int) -> Tensor:
    return torch.full((num_blocks, form.block_bytes), POISON, dtype=torch.uint8)


def table(*blocks: int) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int32)


def shuffled(form: KvFormat, num_slots: int) -> Tensor:
    """Blocks with so many slots, of a pool of one more, in any order."""
    num_blocks = -(-num_slots // form.block_tokens)
    return torch.randperm(num_blocks + 1)[:num_blocks].int()


def assert_as_the_reference(
    on: str,
    source: Tensor,
    source_format: KvFormat,
    source_table: Tensor,
    source_offset: int,
    target_format: KvFormat,
    target_table: Tensor,
    target_offset: int,
    num_tokens: int,
    heads: tuple[int, int, int | None] = (0, 0, None),
) -> Tensor:
    """The target, whose blocks are those of the table and one more. The reference computes on the CPU.

    heads: the source's first, the target's first, how many.
    """
    slices = dict(zip(("source_head", "target_head", "num_heads"), heads, strict=True))
    expected = poisoned(target_format, len(target_table) + 1)
    target = expected.to(on, copy=True)
    arguments = (target_format, target_table, target_offset, num_tokens)
    transfer_tokens_reference(source, source_format, source_table, source_offset, expected, *arguments, **slices)
    transfer_tokens(
        source.to(on), source_format, source_table.to(on), source_offset,
        target, target_format, target_table.to(on), target_offset, num_tokens, **slices,
    )  # fmt: skip
    assert torch.equal(target.cpu(), expected)
    return expected


def assert_whole_block(on: str, source_format: KvFormat, source: Tensor, target_dtype: str) -> Tensor:
    """All tokens of the only block of a pool, to another block of so many: that block."""
    target_format = KvFormat(
        target_dtype,
        source_format.num_layers,
        source_format.num_kv_heads,
        source_format.head_dim,
        source_format.block_tokens,
    )
    num_tokens = source_format.block_tokens
    return assert_as_the_reference(on, source, source_format, table(0), 0, target_format, table(0), 0, num_tokens)[:1]


@SOURCE
@TARGET
@pytest.mark.parametrize(("source_tokens", "target_tokens"), [(16, 16), (16, 32), (64, 16), (8, 128)])
def test_matches_the_reference(
    on: str, source_dtype: str, target_dtype: str, source_tokens: int, target_tokens: int
) -> None:
    torch.manual_seed(source_tokens)
    num_tokens = 70
    for source_offset, target_offset, num_layers, head_dim, target_heads, heads in (
        (0, 0, 1, 16, 3, (0, 0, None)),  # from the edges of blocks on, and every head
        (source_tokens, 2 * target_tokens, 2, 8, 2, (1, 0, 2)),  # the tables' first blocks hold none of them
        (source_tokens - 1, target_tokens + 3, 1, 24, 1, (2, 0, 1)),
        (5, 5, 1, 16, 2, (0, 0, None)),
        (0, 0, 2, 8, 4, (1, 2, 2)),  # beside heads of others in both
    ):
        source_format = KvFormat(source_dtype, num_layers, 3, head_dim, source_tokens)
        target_format = KvFormat(target_dtype, num_layers, target_heads, head_dim, target_tokens)
        source_table = shuffled(source_format, source_offset + num_tokens)
        target_table = shuffled(target_format, target_offset + num_tokens)
        source = filled(source_format, len(source_table) + 1)
        assert_as_the_reference(
            on, source, source_format, source_table, source_offset,
            target_format, target_table, target_offset, num_tokens, heads,
        )  # fmt: skip


@pytest.mark.parametrize(("source_dtype", "target_dtype"), [("bfloat16", "bfloat16"), ("float32", "int8")])
@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_long_transfers_are_tiles(on: str, source_dtype: str, target_dtype: str, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    source_format, target_format = KvFormat(source_dtype, 1, 1, head_dim, 16), KvFormat(target_dtype, 1, 1, head_dim, 3)
    source_table, target_table = shuffled(source_format, 207), shuffled(target_format, 201)
    source = filled(source_format, len(source_table) + 1)
    assert_as_the_reference(on, source, source_format, source_table, 7, target_format, target_table, 1, 200)


@SOURCE
def test_rows_of_one_dtype_keep_their_very_bytes(on: str, source_dtype: str) -> None:
    """NaNs of every kind among them, from whole blocks and from parts of blocks."""
    torch.manual_seed(1)
    form, wider = KvFormat(source_dtype, 2, 2, 8, 4), KvFormat(source_dtype, 2, 2, 8, 6)
    source = torch.randint(256, (3, form.block_bytes), dtype=torch.uint8)
    target = assert_as_the_reference(on, source, form, table(2, 0), 0, form, table(1, 0), 0, 8)
    assert torch.equal(target[[1, 0]], source[[2, 0]])
    assert (target[2] == POISON).all()
    assert_as_the_reference(on, source, form, table(2, 0), 1, wider, table(1, 0), 5, 7)


@SOURCE
@TARGET
def test_every_other_byte_stays(on: str, source_dtype: str, target_dtype: str) -> None:
    source_format, target_format = KvFormat(source_dtype, 1, 3, 8, 4), KvFormat(target_dtype, 1, 2, 8, 8)
    source = torch.zeros(2, source_format.block_bytes, dtype=torch.uint8)
    marked = torch.zeros(3, target_format.block_bytes, dtype=torch.uint8)
    elements, scales = target_format.elements(marked).view(torch.uint8), target_format.scales(marked)
    ones = torch.tensor(0x01010101, dtype=torch.int32).view(torch.float32)
    for block, slots in ((2, slice(6, 8)), (0, slice(0, 3))):
        elements[block, :, :, :, slots] = 1
        if scales is not None:
            scales[block, :, :, :, slots] = ones
    target = poisoned(target_format, 3).to(on)
    transfer_tokens(
        source.to(on), source_format, table(1, 0).to(on), 2, target, target_format, table(2, 0).to(on), 6, 5,
        source_head=1,
    )  # fmt: skip
    assert torch.equal(target.cpu(), torch.where(marked == 1, 0, POISON).to(torch.uint8))


@pytest.mark.parametrize("target_dtype", GREATEST)
def test_numbers_in_the_middle_of_two_are_rounded_to_the_even_one(on: str, target_dtype: str) -> None:
    """Every number, the middles between neighbours, and what is next to both, in rows whose scale is 1."""
    if target_dtype == "int8":
        numbers = torch.arange(128.0)
    else:
        numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = torch.cat([numbers, torch.stack([(a + b) / 2 for a, b in pairwise(numbers)])])
    near = [torch.nextafter(exact, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    values = torch.cat([exact, *near]).clamp(max=GREATEST[target_dtype])
    values = torch.cat([values, -values])
    rows = torch.full((-(-len(values) // 7), 8), GREATEST[target_dtype])
    rows[:, :7] = torch.nn.functional.pad(values, (0, rows.shape[0] * 7 - len(values))).view(-1, 7)
    form = KvFormat("float32", 1, 1, 8, rows.shape[0])
    both = torch.stack([rows, rows.flip(0)]).view(1, 1, 2, 1, *rows.shape)
    target = assert_whole_block(on, form, pool_of(form, both), target_dtype)
    target_format = KvFormat(target_dtype, 1, 1, 8, rows.shape[0])
    scales = target_format.scales(target)
    assert scales is not None
    assert (scales == 1).all()
    kept = target_format.elements(target)[0, 0, 0, 0, :, :7].reshape(-1)[: len(numbers)]
    widened = kept.view(torch.float8_e4m3fn).float() if target_dtype == "fp8" else kept.float()
    assert torch.equal(widened, numbers), "what the dtype can say stays as it is"


@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target_dtype", GREATEST)
def test_rows_may_be_tiny_and_huge(on: str, source_dtype: str, target_dtype: str) -> None:
    torch.manual_seed(2)
    most = [0.0, 2.0**-149, 2.0**-130, LEAST * 0.99, LEAST, LEAST * 1.01, 1.0, 2.0**126, 2.0**127, 3.38e38]
    rows = torch.rand(2, len(most), 24).mul(2).sub(1)
    rows[..., 5] = -1  # the greatest, without its sign
    rows *= torch.tensor(most).unsqueeze(1)
    form = KvFormat(source_dtype, 1, 1, 24, len(most))
    target = assert_whole_block(on, form, pool_of(form, rows.view(1, 1, 2, 1, *rows.shape[1:])), target_dtype)
    scales = KvFormat(target_dtype, 1, 1, 24, len(most)).scales(target)
    assert scales is not None
    assert ((scales > 0) == torch.tensor([of_row >= LEAST for of_row in most])).all()


@pytest.mark.parametrize("source_dtype", GREATEST)
@TARGET
def test_every_element_is_widened(on: str, source_dtype: str, target_dtype: str) -> None:
    """Under scales whose products are rounded, or denormal."""
    form = KvFormat(source_dtype, 1, 4, 64, 4)
    source = torch.zeros(1, form.block_bytes, dtype=torch.uint8)
    codes = torch.arange(256).to(torch.uint8).view(torch.int8)
    if source_dtype == "fp8":
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)  # which are NaNs
    form.elements(source).copy_(codes.view(4, 64))
    scales = form.scales(source)
    assert scales is not None
    scales.copy_(torch.tensor([1.0, 0.1, 2.0**-135, 3.3e35]).view(4, 1))
    assert_whole_block(on, form, source, target_dtype)


@SOURCE
@TARGET
def test_what_is_no_finite_number_stays_none(on: str, source_dtype: str, target_dtype: str) -> None:
    """NaN stays NaN, infinity stays infinity in floats, and a quantized row with one of them is NaNs."""
    rows = torch.ones(2, 3, 8)
    rows[0, 0, 3] = torch.nan
    rows[:, 2, 5] = -torch.inf
    rows[1, 2, 2] = torch.nan
    source_format, plain = KvFormat(source_dtype, 1, 1, 8, 3), KvFormat("float32", 1, 1, 8, 3)
    target_format = KvFormat(target_dtype, 1, 1, 8, 3)
    source = pool_of(source_format, rows.view(1, 1, 2, 1, 3, 8)).to(on)
    target, widened = poisoned(target_format, 1).to(on), poisoned(plain, 1).to(on)
    one = table(0).to(on)
    transfer_tokens(source, source_format, one, 0, target, target_format, one, 0, 3)
    transfer_tokens(target, target_format, one, 0, widened, plain, one, 0, 3)
    found = plain.elements(widened).view(2, 3, 8).cpu()
    if source_format.quantized or target_format.quantized:
        rows = torch.where(rows.isfinite().all(-1, keepdim=True), rows, torch.nan)
    assert torch.equal(found.isnan(), rows.isnan())
    torch.testing.assert_close(found, rows, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("target_dtype", ["bfloat16", "int8"])
def test_a_token_has_the_same_bits_alone(on: str, target_dtype: str) -> None:
    torch.manual_seed(3)
    source_format, target_format = KvFormat("float32", 1, 1, 64, 4), KvFormat(target_dtype, 1, 1, 64, 8)
    source, source_table = filled(source_format, 4).to(on), table(3, 0, 1).to(on)
    target_table = table(1, 0).to(on)
    whole, single = poisoned(target_format, 2).to(on), poisoned(target_format, 2).to(on)
    transfer_tokens(source, source_format, source_table, 1, whole, target_format, target_table, 3, 11)
    for token in range(11):
        transfer_tokens(
            source, source_format, source_table, 1 + token, single, target_format, target_table, 3 + token, 1
        )
    assert torch.equal(single, whole)


def test_no_tokens_are_no_work(on: str) -> None:
    form = KvFormat("bfloat16", 1, 1, 8, 4)
    source, target, none = poisoned(form, 1).to(on), torch.zeros_like(poisoned(form, 1)).to(on), table().to(on)
    transfer_tokens(source, form, none, 0, target, form, none, 0, 0)
    transfer_tokens(source, form, table(9).to(on), 4, target, form, table(-9).to(on), 2, 0)
    assert not target.any()


def test_threads_transfer_beside_one_that_computes() -> None:
    torch.manual_seed(4)
    weight, x = LinearWeight(torch.randn(640, 256)), torch.randn(40, 256)
    product = linear(x, weight)
    source_format, target_format = KvFormat("bfloat16", 2, 2, 64, 16), KvFormat("int8", 2, 2, 64, 32)
    source, expected = filled(source_format, 40), poisoned(target_format, 20)
    source_table, target_table = torch.randperm(40).int(), torch.randperm(20).int()
    transfer_tokens_reference(source, source_format, source_table, 0, expected, target_format, target_table, 0, 640)
    target = poisoned(target_format, 20)

    def move(part: int) -> None:
        """Whole blocks of the target, other ones than the other threads."""
        for _ in range(20):
            for begin in range(32 * part, 640, 96):
                transfer_tokens(
                    source, source_format, source_table, begin, target, target_format, target_table, begin,
                    min(32, 640 - begin),
                )  # fmt: skip

    with ThreadPoolExecutor(3) as threads:
        moving = [threads.submit(move, part) for part in range(3)]
        while not all(future.done() for future in moving):
            assert torch.equal(linear(x, weight), product)
        for future in moving:
            future.result()
    assert torch.equal(target, expected)


@TRITON
@pytest.mark.parametrize("target_dtype", ["bfloat16", "int8"])
def test_triton_leaves_out_tokens_of_blocks_out_of_range(on: str, target_dtype: str) -> None:
    torch.manual_seed(5)
    source_format, target_format = KvFormat("bfloat16", 1, 2, 8, 2), KvFormat(target_dtype, 1, 2, 8, 2)
    source, target = filled(source_format, 3), poisoned(target_format, 4)
    expected = target.clone()
    for block, place in ((2, 1), (0, 3)):
        transfer_tokens_reference(source, source_format, table(block), 0, expected, target_format, table(place), 0, 2)
    target = target.to(on)
    transfer_tokens(
        source.to(on), source_format, table(2, 3, -1, 1, 0, 2**31 - 1).to(on), 0,
        target, target_format, table(1, 0, 2, 4, 3, -(2**31)).to(on), 0, 12,
    )  # fmt: skip
    assert torch.equal(target.cpu(), expected)


def test_a_block_out_of_range_is_refused_before_anything_is_written() -> None:
    form, wider = KvFormat("bfloat16", 1, 1, 8, 4), KvFormat("int8", 1, 1, 8, 8)
    source, target = filled(form, 3), poisoned(wider, 2)
    good, places = table(0, 2, 1), table(1, 0)
    for number in (3, -1):
        with pytest.raises(IndexError, match=rf"source_table\[2\] is {number}, and source has 3 blocks"):
            transfer_tokens(source, form, table(0, 2, number), 0, target, wider, places, 0, 9)
    for number in (2, -1):
        with pytest.raises(IndexError, match=rf"target_table\[1\] is {number}, and target has 2 blocks"):
            transfer_tokens(source, form, good, 0, target, wider, table(1, number), 0, 9)
    assert (target == POISON).all()
    # entries that hold none of the tokens
    transfer_tokens(source, form, table(-1, 2, 3), 4, target, wider, table(-1, 0, 2), 12, 4)
    assert (target[1] == POISON).all()
    assert (target[0] != POISON).any()


def test_broken_contracts_are_refused() -> None:
    source_format, target_format = KvFormat("bfloat16", 2, 4, 8, 4), KvFormat("float32", 2, 2, 8, 2)
    source, target = filled(source_format, 3), poisoned(target_format, 5)
    numbers = torch.arange(3, dtype=torch.int32)

    def refused(message: str, **changed: object) -> None:
        arguments = {
            "source": source, "source_format": source_format, "source_table": numbers, "source_offset": 0,
            "target": target, "target_format": target_format, "target_table": numbers, "target_offset": 0,
            "num_tokens": 6,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            transfer_tokens(**{**arguments, **changed})  # pyright: ignore[reportArgumentType]

    refused("formats must share num_layers, got 2 and 3", target_format=KvFormat("float32", 3, 2, 8, 2))
    refused("formats must share head_dim, got 8 and 16", target_format=KvFormat("float32", 2, 2, 16, 2))
    odd = KvFormat("float32", 2, 2, 4, 2)
    refused("head_dim must be a multiple of 8, got 4", source_format=odd, target_format=odd)
    for head in (-1, 3):
        refused(f"2 heads from source_head {head} on must be among the source's 4", source_head=head)
    refused("1 heads from source_head 4 on must be among the source's 4", source_head=4, target_head=1)
    for heads in ({"target_head": -1, "num_heads": 1}, {"target_head": 1, "num_heads": 2}):
        refused(r"heads from target_head -?\d on must be among the target's 2", **heads)
    for heads in ({"num_heads": 0}, {"target_head": 2}):
        refused("0 heads from source_head 0 on must be among the source's 4", **heads)
    refused("num_tokens must not be negative", num_tokens=-1)
    for name, pool in (("source", source), ("target", target)):
        apart = torch.zeros(len(pool), pool.shape[1] + 4, dtype=torch.uint8)[:, 4:]
        unaligned = torch.zeros(pool.numel() + 1, dtype=torch.uint8)[1:].view_as(pool)
        for wrong in (pool.view(torch.int8), pool[:, 4:].contiguous(), pool[0], apart, unaligned):
            refused(f"{name} must be contiguous torch.uint8", **{name: wrong})
        for wrong in (numbers.long(), numbers[None], torch.arange(6, dtype=torch.int32)[::2]):
            refused(f"{name}_table must be contiguous int32", **{f"{name}_table": wrong})
        refused(f"{name}_table must be on cpu like target, got meta", **{f"{name}_table": numbers.to("meta")})
        refused(f"{name}_offset must not be negative", **{f"{name}_offset": -1})
    refused("source must be on cpu like target, or on a device beside it, got meta", source=source.to("meta"))
    refused("source_table has 12 slots, too few for source_offset 7 and num_tokens 6", source_offset=7)
    refused("target_table has 6 slots, too few for target_offset 1 and num_tokens 6", target_offset=1)
    refused("target must share no memory with source", target_format=source_format, target=source)
    refused("runs on: cpu, cuda", target=target.to("meta"))
    assert (target == POISON).all()
