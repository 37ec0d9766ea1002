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
INLINE = types_pb2.TRANSPORT_INLINE
SHARED_MEMORY = types_pb2.TRANSPORT_SHARED_MEMORY
# as the configuration says them; of two transports the better has the higher number
TRANSPORT_NAMES = {INLINE: "inline", SHARED_MEMORY: "shared_memory"}
TRANSPORTS: dict[str, types_pb2.Transport.ValueType] = {name: transport for transport, name in TRANSPORT_NAMES.items()}
_ENDPOINT = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]):([0-9]{1,5})")


def layout_to_proto(layout: KvLayout) -> kv_pb2.KvLayout:
    """The record as it is sent."""
    return kv_pb2.KvLayout(**{name: getattr(layout, name) for name in LAYOUT_FIELDS})


def check_layout(ours: kv_pb2.KvLayout, theirs: kv_pb2.KvLayout) -> None:
    """Raises FAILED_PRECONDITION naming every field in which two workers' layouts differ."""
    differing = [name for name in LAYOUT_FIELDS if getattr(ours, name) != getattr(theirs, name)]
    if len(differing) > 1 and "digest" in differing:
        differing.remove("digest")  # it only follows from the others
    if differing:
        pairs = [f"{name} is {getattr(ours, name)!r} here and {getattr(theirs, name)!r} there" for name in differing]
        raise mismatch(f"layout.{differing[0]}", "the workers' KV layouts differ: " + "; ".join(pairs))


def check_endpoint(kv_endpoint: str) -> None:
    """Raises INVALID_ARGUMENT unless it is host:port: gRPC would also take names of files and of other resolvers."""
    match = _ENDPOINT.fullmatch(kv_endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise invalid("kv_endpoint", f"{kv_endpoint[:300]!r} is not host:port")


def check_extent(extent: kv_pb2.KvExtent, layout: KvLayout) -> None:
    """Raises INVALID_ARGUMENT unless the extent's numbers agree with each other, FAILED_PRECONDITION on another layout.

    Whether the blocks exist depends on the peer's pool: `check_blocks`.
    """
    check_endpoint(extent.kv_endpoint)
    if extent.layout_digest != layout.digest:
        raise mismatch(
            "extent.layout_digest", f"{extent.layout_digest[:64]!r} is not this worker's layout, {layout.digest}"
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


def refusal(transport: types_pb2.Transport.ValueType, reason: str) -> kv_pb2.TransportRefusal:
    """Why a transport is not used."""
    return kv_pb2.TransportRefusal(transport=transport, reason=reason)


def describe(refusals: Sequence[kv_pb2.TransportRefusal]) -> str:
    """Refusals as one sentence."""
    return (
        "; ".join(f"{TRANSPORT_NAMES.get(r.transport, r.transport)}: {r.reason}" for r in refusals) or "no reason given"
    )


def requirement(required: str, refusals: Sequence[kv_pb2.TransportRefusal]) -> RpcError:
    """FAILED_PRECONDITION: `transport.require` cannot be met, and why."""
    return mismatch("transport.require", f"{required} is required and cannot be used: {describe(refusals)}")
