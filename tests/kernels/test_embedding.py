"""The embedding of tokens against its float64 reference, and the same bits for a row among any others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import record
from kernels.embedding import embed, embed_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
PARTS = pytest.mark.parametrize("parts", ["", "positions", "types", "positions types"])
TRITON = pytest.mark.parametrize(
    "on", ["triton, interpreted", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(on: str, rows: int, width: int, parts: str, dtype: torch.dtype) -> dict[str, Any]:
    """Of 11 tokens, 9 positions from the offset 2 on, and 3 types."""
    torch.manual_seed(rows * width)
    given: dict[str, Any] = {"table": torch.randn(11, width), "token_ids": torch.randint(11, (rows,))}
    if "positions" in parts:
        positions = torch.randint(-2, 7, (rows,), dtype=torch.int32)
        given |= {"positions": positions, "position_table": torch.randn(9, width), "offset": 2}
    if "types" in parts:
        given |= {"token_types": torch.randint(3, (rows,)), "type_table": torch.randn(3, width)}
    return {
        name: part.to(on, dtype if part.is_floating_point() else part.dtype) if isinstance(part, Tensor) else part
        for name, part in given.items()
    }


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: part.double() if "table" in name else part for name, part in given.items()}


@DTYPES
@PARTS
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 7), (3, 1030)])
@pytest.mark.parametrize("scale", [1.0, 7.7])
def test_matches_the_reference(on: str, rows: int, width: int, scale: float, parts: str, dtype: torch.dtype) -> None:
    given = inputs(on, rows, width, parts, dtype)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=on)
    assert embed(**given, scale=scale, out=out) is out
    expected = embed_reference(**double(given), scale=scale)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_every_bit_of_the_table_alone_is_copied(on: str) -> None:
    bits = torch.tensor([[0x7FC0, 0x7F81, -1], [-32768, 1, 0x7F80]], dtype=torch.int16, device=on)  # NaNs, -0, denormal
    copied = embed(bits.view(torch.bfloat16), torch.tensor([1, 0, 1], device=on))
    assert torch.equal(copied.view(torch.int16), bits[[1, 0, 1]])


def test_sums_are_rounded_once(on: str) -> None:
    one, step = torch.ones(1, 1, device=on).bfloat16(), torch.full((1, 1), 2**-8, device=on).bfloat16()
    at = torch.zeros(1, dtype=torch.int64, device=on)
    y = embed(one, at, positions=at.int(), position_table=step, token_types=at, type_table=step)
    assert y.item() == 1 + 2**-7  # either step alone would be lost


@DTYPES
def test_a_row_keeps_its_bits_among_others(on: str, dtype: torch.dtype) -> None:
    given = inputs(on, 9, 577, "positions types", dtype)
    whole = embed(**given, scale=7.7)
    for rows in (1, 2, 5):
        last = {name: given[name][-rows:] for name in ("token_ids", "positions", "token_types")}
        assert torch.equal(embed(**given | last, scale=7.7), whole[-rows:])


@DTYPES
def test_a_row_keeps_its_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    given = inputs("cpu", 256, 577, "positions types", dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = embed(**given, scale=7.7)
        torch.set_num_threads(2)
        assert torch.equal(embed(**given, scale=7.7), whole)
    finally:
        torch.set_num_threads(before)


@PARTS
def test_a_replay_embeds_the_tokens_of_the_moment(parts: str) -> None:
    given = inputs("cpu", 4, 33, parts, torch.bfloat16)
    out = torch.full((4, 33), torch.nan).bfloat16()
    with record() as replay:
        embed(**given, out=out)
    for name in given.keys() & {"token_ids", "positions", "token_types"}:
        given[name].copy_(given[name].flip(0))
    replay()
    assert torch.equal(out, embed(**given))


@TRITON
def test_triton_gives_zeros_for_a_part_out_of_range(on: str) -> None:
    given = inputs(on, 7, 1030, "positions types", torch.float32)
    parts = []
    for index, table, wrong in (
        ("token_ids", "table", [11, -1, 2**62]),
        ("positions", "position_table", [7, -3, 2**31 - 1]),
        ("token_types", "type_table", [3, -1, -(2**62)]),
    ):
        rows = given[index].long() + (2 if index == "positions" else 0)
        part = given[table][rows]
        at = 1 + 2 * len(parts)  # each part misses rows of its own, and the first row misses all
        for row, number in zip((0, at, at + 1), wrong, strict=True):
            given[index][row] = number
            part[row] = 0
        parts.append(part)
    out = torch.full((7, 1030), torch.nan, device=on)
    embed(**given, scale=7.7, out=out)
    assert not out[0].any()
    torch.testing.assert_close(out, 7.7 * parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize(
    ("argument", "number", "message"),
    [
        ("token_ids", 11, r"token_ids\[1\] is 11, and the table has 11 rows"),
        ("token_ids", -1, r"token_ids\[1\] is -1"),
        ("positions", 7, r"positions\[1\] is 7, and from the offset 2 on the position_table has 7 rows"),
        ("positions", -3, r"positions\[1\] is -3"),
        ("token_types", 3, r"token_types\[1\] is 3, and the type_table has 3 rows"),
        ("token_types", -1, r"token_types\[1\] is -1"),
    ],
)
def test_an_index_out_of_range_is_named_and_nothing_written(argument: str, number: int, message: str) -> None:
    given = inputs("cpu", 5, 7, "positions types", torch.float32)
    given[argument][1] = number
    out = torch.full((5, 7), 77.0)
    with pytest.raises(IndexError, match=message):
        embed(**given, out=out)
    assert torch.equal(out, torch.full((5, 7), 77.0))


def test_no_rows_are_no_work(on: str) -> None:
    assert embed(**inputs(on, 0, 64, "positions types", torch.float32)).shape == (0, 64)


def test_broken_contracts_are_refused() -> None:
    table, token_ids, positions = torch.zeros(4, 3), torch.tensor([0, 1]), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="table must be"):
        embed(table.T, token_ids)
    with pytest.raises(ValueError, match="table must be contiguous float32, bfloat16 or float16"):
        embed(table.double(), token_ids)
    with pytest.raises(ValueError, match="token_ids must be"):
        embed(table, token_ids.int())
    with pytest.raises(ValueError, match="positions and position_table come together"):
        embed(table, token_ids, positions=positions)
    with pytest.raises(ValueError, match="token_types and type_table come together"):
        embed(table, token_ids, type_table=table)
    with pytest.raises(ValueError, match=r"positions must be contiguous torch.int32 \[2\]"):
        embed(table, token_ids, positions=token_ids, position_table=table)
    with pytest.raises(ValueError, match=r"token_types must be contiguous torch.int64 \[2\]"):
        embed(table, token_ids, token_types=token_ids[:1], type_table=table)
    with pytest.raises(ValueError, match="position_table must be"):
        embed(table, token_ids, positions=positions, position_table=table.bfloat16())
    with pytest.raises(ValueError, match="type_table must be"):
        embed(table, token_ids, token_types=token_ids, type_table=table[:, :2].contiguous())
    with pytest.raises(ValueError, match="out must be"):
        embed(table, token_ids, out=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="runs on: cpu, cuda"):
        embed(table.to("meta"), token_ids)
