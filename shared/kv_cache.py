"""The paged pool of keys and values, and the record of its layout that both ends of a handoff must share."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kernels.kv_format import KvFormat, KvPlanes
from shared.models.architecture import Architecture
from shared.parallel.sharding import Shard, head_shares

# Raised whenever the bytes of a block come to mean something else.
CONTRACT_VERSION = 2
ORDER = "block,layer,kv,head,token,dim"


@dataclass(frozen=True)
class KvLayout:
    """What the bytes of one block mean. What may differ between two workers that hand over says
    shared.transport.wire.check_layouts.

    `dtype` is a key of kernels.kv_format.ELEMENTS; `order` names the axes of the pool from slowest to fastest (kv: 0
    keys, 1 values). The pool holds `num_kv_heads` of the model's key/value heads, from `first_kv_head` on.
    """

    model_digest: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    first_kv_head: int = 0
    order: str = ORDER
    contract_version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        """ValueError for a dtype that no block has."""
        _ = self.format

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        model_digest: str,
        dtype: str,
        block_tokens: int,
        shard: Shard | None = None,
    ) -> "KvLayout":
        """The layout of a model's cache, or of what a shard's rank has of it. ValueError for one that cannot be cut."""
        kv_heads = range(architecture.num_kv_heads)
        if shard is not None:
            kv_heads = head_shares(architecture.num_heads, len(kv_heads), shard.size)[shard.rank].kv_heads
        return cls(
            model_digest=model_digest,
            dtype=dtype,
            num_layers=architecture.num_layers,
            num_kv_heads=len(kv_heads),
            head_dim=architecture.head_dim,
            block_tokens=block_tokens,
            first_kv_head=kv_heads.start,
        )

    @classmethod
    def joined(cls, layouts: Sequence["KvLayout"]) -> "KvLayout":
        """What pools with a slice of the heads each hold together. Slices may overlap.

        Raises ValueError naming the field by which they are no pools of one worker.
        """
        first, end = min(layout.first_kv_head for layout in layouts), max(layout.end_kv_head for layout in layouts)
        whole = replace(layouts[0], first_kv_head=first, num_kv_heads=end - first)
        for number, layout in enumerate(layouts):
            if layout.num_kv_heads < 1:
                raise ValueError(f"pools[{number}].num_kv_heads: is {layout.num_kv_heads}")
            for field in layout.difference(replace(whole, first_kv_head=layout.first_kv_head)):
                if field != "num_kv_heads":
                    theirs, ours = getattr(layout, field), getattr(whole, field)
                    raise ValueError(f"pools[{number}].{field}: is {theirs!r}, and {ours!r} in pools[0]")
        held = first
        for layout in sorted(layouts, key=lambda layout: layout.first_kv_head):
            if layout.first_kv_head > held:
                raise ValueError(f"pools.first_kv_head: head {held} is in none of the pools")
            held = max(held, layout.end_kv_head)
        return whole

    @property
    def end_kv_head(self) -> int:
        """One behind the last of the model's key/value heads that the pool holds."""
        return self.first_kv_head + self.num_kv_heads

    @property
    def digest(self) -> str:
        """Hex sha256 of the record as canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def format(self) -> KvFormat:
        """What lies where in a block."""
        return KvFormat(self.dtype, self.num_layers, self.num_kv_heads, self.head_dim, self.block_tokens)

    @property
    def block_bytes(self) -> int:
        return self.format.block_bytes

    def difference(self, other: "KvLayout") -> list[str]:
        """The names of the fields in which two layouts differ."""
        mine, theirs = asdict(self), asdict(other)
        return [field for field in mine if mine[field] != theirs[field]]


class KvCache:
    """`num_blocks` blocks in one allocation; block 0 is the null block.

    `pool` is uint8 [num_blocks, block_bytes]; kernels/kv_format.py says what lies where in a block.
    """

    def __init__(
        self, layout: KvLayout, num_blocks: int, *, memory: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """In `memory` (uint8 [num_blocks * block_bytes], zero at first as fresh shared memory is), or in memory of its
        own on the device. ValueError if the memory has another size.

        Zeros matter: a row of attention may multiply a slot that nobody wrote by the weight 0, and 0 * NaN is NaN.
        """
        self.layout = layout
        self.num_blocks = num_blocks
        form = layout.format
        if memory is None:
            memory = torch.zeros(num_blocks * form.block_bytes, dtype=torch.uint8, device=device)
        elif memory.numel() != num_blocks * form.block_bytes:
            raise ValueError(
                f"a pool of {num_blocks} blocks of {form.block_bytes} bytes cannot lie in {memory.numel()} bytes"
            )
        self.pool = memory.view(num_blocks, form.block_bytes)
        self._layers = [form.planes(self.pool, layer) for layer in range(layout.num_layers)]

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    def layer(self, index: int) -> KvPlanes:
        """Keys and values of a layer, as views."""
        return self._layers[index]

    def block(self, index: int) -> Tensor:
        """The bytes of a block: uint8 [block_bytes], a view. IndexError for a block that is not in the pool."""
        return self.pool[index]

    def close(self) -> None:
        """Lets go of the pool's memory, which is given back with the last view of it."""
        self._layers.clear()
        self.pool = torch.empty(0, dtype=torch.uint8)
