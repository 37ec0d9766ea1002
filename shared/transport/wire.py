"""What crosses the wire about a pool, and the checks on it. Nothing from a peer is used before it has passed here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.v1 import kv_pb2, types_pb2

from shared.rpc import RpcError, invalid, mismatch

if TYPE_CHECKING:
    from shared.kv_cache import KvLayout

CHUNK_BYTES = 1 << 20  # of KvService.Fetch: the fastest size, and far below the bound on messages
LAYOUT_FIELDS = tuple(field.name for field in kv_pb2.KvLayout.DESCRIPTOR.fields)
# in these two workers agree; the others are converted
FIXED_FIELDS = ("contract_version", "model_digest", "order", "num_layers", "head_dim")
INLINE = types_pb2.TRANSPORT_INLINE
SHARED_MEMORY = types_pb2.TRANSPORT_SHARED_MEMORY
CUDA_IPC = types_pb2.TRANSPORT_CUDA_IPC
# as the configuration says them; of two transports the better has the higher number
TRANSPORT_NAMES = {INLINE: "inline", SHARED_MEMORY: "shared_memory", CUDA_IPC: "cuda_ipc"}
TRANSPORTS: dict[str, types_pb2.Transport.ValueType] = {name: transport for transport, name in TRANSPORT_NAMES.items()}
MAX_POOLS = 64
_ENDPOINT = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]):([0-9]{1,5})")


def layout_to_proto(layout: KvLayout) -> kv_pb2.KvLayout:
    """The record as it is sent."""
    return kv_pb2.KvLayout(**{name: getattr(layout, name) for name in LAYOUT_FIELDS})


def layout_from_proto(layout: kv_pb2.KvLayout, field: str = "layout") -> KvLayout:
    """A peer's record. Raises FAILED_PRECONDITION for one that cannot be, or whose digest is not its own."""
    from shared.kv_cache import KvLayout  # it loads torch, which the gateway does not

    values = {name: getattr(layout, name) for name in LAYOUT_FIELDS if name != "digest"}
    try:
        record = KvLayout(**values)
    except ValueError as error:
        raise mismatch(field, str(error)) from None
    if not record.block_tokens:
        raise mismatch(f"{field}.block_tokens", "is 0")
    if record.digest != layout.digest:
        raise mismatch(
            f"{field}.digest", f"{layout.digest[:64]!r} is not the digest of the other fields, {record.digest}"
        )
    return record


def pools_from_proto(response: kv_pb2.HandshakeResponse) -> list[tuple[KvLayout, Sequence[kv_pb2.KvHandle]]]:
    """A peer's pools and how to reach each, in its order.

    Raises FAILED_PRECONDITION naming the field unless each can be, and all together hold what `layout` says.
    """
    from shared.kv_cache import KvLayout

    whole = layout_from_proto(response.layout)
    if not response.pools:
        return [(whole, response.handles)]
    if len(response.pools) > MAX_POOLS:
        raise mismatch("pools", f"{len(response.pools)} are more than {MAX_POOLS}")
    layouts = [layout_from_proto(pool.layout, f"pools[{i}].layout") for i, pool in enumerate(response.pools)]
    try:
        joined = KvLayout.joined(layouts)
    except ValueError as error:
        field, _, message = str(error).partition(": ")
        raise mismatch(field, message) from None
    if differing := joined.difference(whole):
        field = differing[0]
        raise mismatch(
            f"pools.{field}",
            f"the pools together have {getattr(joined, field)!r}, the worker {getattr(whole, field)!r}",
        )
    return [(layout, pool.handles) for layout, pool in zip(layouts, response.pools, strict=True)]


def check_layouts(source: kv_pb2.KvLayout, target: kv_pb2.KvLayout, *, converts_dtype: bool) -> None:
    """Raises FAILED_PRECONDITION naming every field that keeps blocks of `source` from going to `target`.

    Tokens may come in blocks of another size, and a target may hold a slice of the source's heads. converts_dtype: the
    decode worker takes another dtype too.
    """
    fields = FIXED_FIELDS if converts_dtype else (*FIXED_FIELDS, "dtype")
    differing = [name for name in fields if getattr(source, name) != getattr(target, name)]
    pairs = [
        f"{name} is {getattr(source, name)!r} on prefill and {getattr(target, name)!r} on decode" for name in differing
    ]
    if "dtype" in differing:
        pairs[differing.index("dtype")] += "; make them alike, or set transport.convert_dtype on decode"
    heads = range(source.first_kv_head, source.first_kv_head + source.num_kv_heads)
    for name, head in (
        ("first_kv_head", target.first_kv_head),
        ("num_kv_heads", target.first_kv_head + target.num_kv_heads - 1),
    ):
        if head not in heads:
            differing.append(name)
            pairs.append(f"head {head} is wanted on decode, prefill holds {len(heads)} from {heads.start} on")
            break
    if differing:
        raise mismatch(f"layout.{differing[0]}", "the workers' KV layouts do not fit: " + "; ".join(pairs))


def check_endpoint(kv_endpoint: str) -> None:
    """Raises INVALID_ARGUMENT unless it is host:port: gRPC would also take names of files and of other resolvers."""
    match = _ENDPOINT.fullmatch(kv_endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise invalid("kv_endpoint", f"{kv_endpoint[:300]!r} is not host:port")


def check_extent(extent: kv_pb2.KvExtent, layout: KvLayout) -> None:
    """Raises INVALID_ARGUMENT unless the extent's numbers agree with each other, FAILED_PRECONDITION on another layout.

    layout: of the peer's pool. Whether the blocks exist depends on that pool: `check_blocks`.
    """
    if extent.layout_digest != layout.digest:
        raise mismatch(
            "extent.layout_digest", f"{extent.layout_digest[:64]!r} is not the pool's layout, {layout.digest}"
        )
    if extent.first_token % layout.block_tokens:
        raise invalid("extent.first_token", f"{extent.first_token} is no multiple of {layout.block_tokens}")
    num_blocks = -(-extent.num_tokens // layout.block_tokens)
    if not num_blocks or num_blocks != len(extent.block_ids):
        raise invalid(
            "extent.num_tokens", f"{extent.num_tokens} tokens do not take exactly {len(extent.block_ids)} blocks"
        )


def check_blocks(field: str, block_ids: Sequence[int], num_blocks: int) -> None:
    """Raises INVALID_ARGUMENT unless all are blocks of a pool of num_blocks, none the null block, none twice."""
    if not 0 < len(block_ids) < num_blocks:
        raise invalid(field, f"{len(block_ids)} blocks of a pool that has {num_blocks - 1}")
    if min(block_ids) < 1 or max(block_ids) >= num_blocks:
        raise invalid(field, f"blocks {min(block_ids)} to {max(block_ids)} are not all in 1..{num_blocks - 1}")
    if len(set(block_ids)) != len(block_ids):
        raise invalid(field, "a block is listed twice")


def host_id() -> str:
    """Equal on processes of one running kernel, which alone can share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def refusal(transport: types_pb2.Transport.ValueType, reason: str) -> types_pb2.TransportRefusal:
    """Why a transport is not used."""
    return types_pb2.TransportRefusal(transport=transport, reason=reason)


def describe(refusals: Sequence[types_pb2.TransportRefusal]) -> str:
    """Refusals as one sentence."""
    return (
        "; ".join(f"{TRANSPORT_NAMES.get(r.transport, r.transport)}: {r.reason}" for r in refusals) or "no reason given"
    )


def requirement(required: str, refusals: Sequence[types_pb2.TransportRefusal]) -> RpcError:
    """FAILED_PRECONDITION: `transport.require` cannot be met, and why."""
    return mismatch("transport.require", f"{required} is required and cannot be used: {describe(refusals)}")
