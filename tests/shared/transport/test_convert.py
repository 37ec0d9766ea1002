"""Tokens between pools of different layouts, over every transport: each row has the converted reference's bits."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tandem.v1 import types_pb2

from kernels.kv_format import quantize_rows, widen_rows
from shared import rpc
from shared.kv_cache import KvLayout
from tests.shared.transport.fake_cuda import FakeCuda

CUDA_IPC, SHARED_MEMORY, INLINE = (
    types_pb2.TRANSPORT_CUDA_IPC,
    types_pb2.TRANSPORT_SHARED_MEMORY,
    types_pb2.TRANSPORT_INLINE,
)
TRANSPORTS = {"cuda_ipc": CUDA_IPC, "shared_memory": SHARED_MEMORY, "inline": INLINE}
# a device of memory files computes in C, and by this way with the kernel that a GPU has
WAYS = {**TRANSPORTS, "cuda_ipc, interpreted": CUDA_IPC}
BASE = KvLayout("ab" * 32, "bfloat16", num_layers=2, num_kv_heads=4, head_dim=16, block_tokens=16)
LAYOUTS = {
    "smaller blocks": (replace(BASE, block_tokens=64), BASE),
    "larger blocks": (BASE, replace(BASE, block_tokens=64)),
    "bfloat16 to int8": (BASE, replace(BASE, dtype="int8")),
    "bfloat16 to fp8": (BASE, replace(BASE, dtype="fp8")),
    "int8 to bfloat16": (replace(BASE, dtype="int8"), BASE),
    "float32 to bfloat16": (replace(BASE, dtype="float32"), BASE),
    "float16 to bfloat16": (replace(BASE, dtype="float16"), BASE),
    "a slice of the heads": (BASE, replace(BASE, first_kv_head=1, num_kv_heads=2)),
    "all at once": (BASE, replace(BASE, dtype="int8", block_tokens=8, first_kv_head=2, num_kv_heads=2)),
}
NUM_TOKENS = 150


def fill(pool: memoryview, layout: KvLayout) -> None:
    """Any bytes at all may stand for something else than numbers."""
    tensor = torch.frombuffer(pool, dtype=torch.uint8).view(-1, layout.block_bytes)
    form, generator = layout.format, torch.Generator().manual_seed(3)
    elements = form.elements(tensor)
    rows = torch.randn(elements.shape, generator=generator)
    if (scales := form.scales(tensor)) is None:
        elements.copy_(rows)
    else:
        quantized, scale = quantize_rows(rows, layout.dtype)
        elements.copy_(quantized)
        scales.copy_(scale)


def rows_of(pool: bytes, layout: KvLayout, table: list[int], num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Elements [tokens, layers, 2, heads, head_dim], and scales [tokens, layers, 2, heads] if there are any."""
    tensor = torch.frombuffer(bytearray(pool), dtype=torch.uint8).view(-1, layout.block_bytes)
    form = layout.format
    elements = form.elements(tensor)[table].movedim(4, 1).flatten(0, 1)[:num_tokens]
    scales = form.scales(tensor)
    return (elements,) if scales is None else (elements, scales[table].movedim(4, 1).flatten(0, 1)[:num_tokens])


def converted(rows: tuple[torch.Tensor, ...], source: KvLayout, target: KvLayout) -> tuple[torch.Tensor, ...]:
    first = target.first_kv_head - source.first_kv_head
    rows = tuple(part[:, :, :, first : first + target.num_kv_heads] for part in rows)
    if source.dtype == target.dtype:
        return rows
    floats = widen_rows(*rows, source.dtype) if source.format.quantized else rows[0].float()
    if target.format.quantized:
        return quantize_rows(floats, target.dtype)
    return (floats.to(getattr(torch, target.dtype)),)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LAYOUTS)
async def test_tokens_arrive_converted(serve, importing, request, way, case):
    """In extents of whole blocks as a chunked prefill announces them, behind tokens that are held here."""
    if way.endswith("interpreted"):
        request.getfixturevalue("interpreter")
    source, target = LAYOUTS[case]
    on_device = way.startswith("cuda_ipc")
    served = await serve(num_blocks=40, layout=source, cuda=FakeCuda() if on_device else None)
    decode = importing(
        num_blocks=40,
        layout=target,
        cuda=FakeCuda() if on_device else None,
        disable=["shared_memory"] if way == "inline" else [],
        convert_dtype=source.dtype != target.dtype,
    )
    fill(served.pool, source)
    before = bytes(decode.pool)
    draw = random.Random(7)
    theirs = draw.sample(range(1, 40), -(-NUM_TOKENS // source.block_tokens))
    ours = draw.sample(range(1, 40), -(-NUM_TOKENS // target.block_tokens))
    served.exporter.open_export("x", theirs)
    held = 2 * target.block_tokens if target.block_tokens < 64 else 0
    first = held // source.block_tokens * source.block_tokens
    edges = [*range(first, NUM_TOKENS, 2 * source.block_tokens), NUM_TOKENS]
    for begin, end in pairwise(edges):
        blocks = theirs[begin // source.block_tokens : -(-end // source.block_tokens)]
        extent = await served.exporter.extent("x", blocks, begin, end - begin)
        result = await decode.importer.copy(extent, ours, held)
        assert result.transport == WAYS[way]
        assert result.num_bytes == len(blocks) * source.block_bytes
    expected = converted(rows_of(bytes(served.pool), source, theirs, NUM_TOKENS), source, target)
    for got, want in zip(rows_of(bytes(decode.pool), target, ours, NUM_TOKENS), expected, strict=True):
        assert torch.equal(got[held:], want[held:])
    # what was held, and every block of others, is as it was
    kept = rows_of(before, target, ours, NUM_TOKENS)
    for got, was in zip(rows_of(bytes(decode.pool), target, ours, NUM_TOKENS), kept, strict=True):
        assert torch.equal(got[:held].view(torch.uint8), was[:held].view(torch.uint8))
    assert decode.untouched(*ours)


async def test_another_dtype_has_to_be_asked_for(serve, importing):
    served = await serve(layout=BASE)
    strict = importing(layout=replace(BASE, dtype="int8"))
    with pytest.raises(rpc.RpcError, match=r"layout.dtype: .*set transport.convert_dtype on decode") as caught:
        await strict.importer.connect(served.kv_endpoint)
    assert caught.value.code.name == "FAILED_PRECONDITION"
    # and the other way round, whoever of the two is asked first
    assert (await importing(layout=BASE).importer.connect(served.kv_endpoint)).transport == SHARED_MEMORY


async def test_heads_that_prefill_does_not_hold_are_refused(serve, importing):
    served = await serve(layout=replace(BASE, first_kv_head=2, num_kv_heads=2))
    for change, field in (({}, "first_kv_head"), ({"first_kv_head": 3, "num_kv_heads": 2}, "num_kv_heads")):
        with pytest.raises(rpc.RpcError, match=rf"layout\.{field}: ") as caught:
            await importing(layout=replace(BASE, **change)).importer.connect(served.kv_endpoint)
        assert caught.value.code.name == "FAILED_PRECONDITION"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_checksum_is_of_the_bytes_that_were_sent(serve, importing, transport):
    source, target = LAYOUTS["all at once"]
    on_device = transport == "cuda_ipc"
    served = await serve(layout=source, cuda=FakeCuda() if on_device else None, checksum=True)
    decode = importing(
        layout=target,
        num_blocks=64,
        cuda=FakeCuda() if on_device else None,
        disable=["shared_memory"] if transport == "inline" else [],
        convert_dtype=True,
    )
    fill(served.pool, source)
    served.exporter.open_export("x", [3, 9])
    extent = await served.exporter.extent("x", [3, 9], 0, 30)
    await decode.importer.copy(extent, [5, 6, 7, 8])
    expected = converted(rows_of(bytes(served.pool), source, [3, 9], 30), source, target)
    for got, want in zip(rows_of(bytes(decode.pool), target, [5, 6, 7, 8], 30), expected, strict=True):
        assert torch.equal(got, want)
    extent.crc32 ^= 1
    with pytest.raises(rpc.RpcError, match="checksum"):
        await decode.importer.copy(extent, [5, 6, 7, 8])
