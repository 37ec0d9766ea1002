"""A tiny GPT-2 as Megatron-LM's checkpoints have it, row by row, in every version and at every degree."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

LAYERS, HEADS, HEAD_DIM, VOCAB, POSITIONS = 2, 4, 3, 10, 5
HIDDEN, INNER = HEADS * HEAD_DIM, 20
VERSIONS = (0, 1.0, 2.0, 3.0)


@dataclass
class Gpt2:
    """`queries`, `keys`, `values` of each layer: [heads, head_dim, ...], weight and bias."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors |= {
            "word_embeddings.weight": torch.randn(VOCAB, HIDDEN),
            "position_embeddings.weight": torch.randn(POSITIONS, HIDDEN),
            "transformer.final_layernorm.weight": torch.randn(HIDDEN),
            "transformer.final_layernorm.bias": torch.randn(HIDDEN),
        }
        for layer in range(LAYERS):
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "attention.dense": (HIDDEN, HIDDEN),
                "mlp.dense_h_to_4h": (INNER, HIDDEN),
                "mlp.dense_4h_to_h": (HIDDEN, INNER),
            }.items():
                self.tensors[f"transformer.layers.{layer}.{name}.weight"] = torch.randn(shape)
                self.tensors[f"transformer.layers.{layer}.{name}.bias"] = torch.randn(shape[0])
            for part, shape in (("weight", (HEADS, HEAD_DIM, HIDDEN)), ("bias", (HEADS, HEAD_DIM))):
                name = f"transformer.layers.{layer}.attention.query_key_value.{part}"
                self.fused[name] = (torch.randn(shape), torch.randn(shape), torch.randn(shape))

    def flat(self, heads: range = range(HEADS)) -> dict[str, Tensor]:
        """What a reader must give: fused rows are queries, then keys, then values, of some heads."""
        return self.tensors | {
            name: torch.cat([part[heads.start : heads.stop].flatten(0, 1) for part in parts])
            for name, parts in self.fused.items()
        }

    def shard(self, rank: int, ranks: int, version: float) -> dict[str, Tensor]:
        """A rank's parameters by flat names, with fused rows in the version's order."""
        return {name: cut(name, value, rank, ranks) for name, value in self.tensors.items()} | {
            name: mixed(parts, heads_of(rank, ranks), version) for name, parts in self.fused.items()
        }

    def rank(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """What a reader must give for a rank: its part of everything."""
        flat = self.flat(heads_of(rank, ranks))
        return {
            name: flat[name] if name in self.fused else cut(name, value, rank, ranks) for name, value in flat.items()
        }

    def write(self, folder: Path, ranks: int, version: float, **more: object) -> list[Path]:
        """DeepSpeed's training files, one for each rank, nested as Megatron-LM does it."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
        for rank, path in enumerate(paths):
            entries = {"module": nested(self.shard(rank, ranks, version), new=version >= 2), "mp_world_size": ranks}
            # the first versions did not say which they were
            torch.save(entries | ({"checkpoint_version": version} if version else {}) | more, path)
        return paths


def heads_of(rank: int, ranks: int) -> range:
    return range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)


def cut(name: str, value: Tensor, rank: int, ranks: int) -> Tensor:
    """A parameter that is not fused, as Megatron cuts it; its vocabulary has padding."""
    if name == "word_embeddings.weight":
        share = -(-VOCAB // ranks)
        return torch.cat([value, torch.zeros(share * ranks - VOCAB, HIDDEN)])[rank * share : (rank + 1) * share]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return value.chunk(ranks, 1)[rank]
    return value.chunk(ranks)[rank] if "dense_h_to_4h" in name else value


def mixed(parts: tuple[Tensor, Tensor, Tensor], heads: range, version: float) -> Tensor:
    """Fused rows of some heads, one by one."""
    if version == 0:
        rows = [part[head, d] for part in parts for head in heads for d in range(HEAD_DIM)]
    elif version == 1:
        rows = [part[head, d] for head in heads for d in range(HEAD_DIM) for part in parts]
    else:
        rows = [part[head, d] for head in heads for part in parts for d in range(HEAD_DIM)]
    return torch.stack(rows)


def nested(tensors: dict[str, Tensor], *, new: bool) -> dict[str, object]:
    """model → language_model → embedding, transformer; in newer files `encoder` with `self_attention`."""
    layers = {name.removeprefix("transformer."): value for name, value in tensors.items() if "transformer." in name}
    if new:
        layers = {name.replace(".attention.", ".self_attention."): value for name, value in layers.items()}
    embedding = {
        "word_embeddings": {"weight": tensors["word_embeddings.weight"]},
        "position_embeddings": {"weight": tensors["position_embeddings.weight"]},
    }
    return {"language_model": {"embedding": embedding, "encoder" if new else "transformer": layers}}
