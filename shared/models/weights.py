"""The parameters of a decoder, taken from a checkpoint by the family's name table and packed for the ops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear import LinearWeight, probe_row_invariance
from shared.checkpoint import Checkpoint, CheckpointError, check_names
from shared.models.architecture import Architecture
from shared.policies.table import POLICIES

# Left over in old checkpoints: frequencies, which the config gives.
_IGNORED = (r".*rotary_emb\.inv_freq",)


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norms are [hidden], `q_norm` and `k_norm` [head_dim] where the family has them."""

    input_norm: Tensor
    qkv: LinearWeight  # [(heads + 2 * kv_heads) * head_dim, hidden]
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearWeight  # [hidden, heads * head_dim]
    mlp_norm: Tensor
    gate_up: LinearWeight  # [2 * intermediate, hidden], gate first
    down: LinearWeight  # [hidden, intermediate]


@dataclass(frozen=True)
class DecoderWeights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    lm_head: LinearWeight  # [vocab, hidden]


def load_weights(
    architecture: Architecture, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
) -> DecoderWeights:
    """Reads parameter by parameter, so that at most one is held raw and packed at once.

    Raises CheckpointError naming parameters that are missing, unexpected or of another shape than the config says, and
    RuntimeError if this CPU's matmuls cannot keep a row's bits free of the rows beside it.
    """
    weights = _Loader(architecture, checkpoint, dtype, device).load()
    first = weights.layers[0]
    for weight in (first.qkv, first.output, first.gate_up, first.down, weights.lm_head):
        probe_row_invariance(weight)
    return weights


class _Loader:
    def __init__(
        self, architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.architecture, self.checkpoint, self.dtype, self.device = architecture, checkpoint, dtype, device
        self.names = POLICIES[architecture.family].names
        self.shapes = _shapes(architecture)

    def load(self) -> DecoderWeights:
        # A tied checkpoint may carry the output layer a second time.
        ignored = (*_IGNORED, *self.names["lm_head"]) if self.architecture.tie_embeddings else _IGNORED
        check_names(self.checkpoint.names(), self._expected(), ignored)
        embedding = self._tensor("embedding")
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(layer) for layer in range(self.architecture.num_layers)),
            final_norm=self._tensor("final_norm"),
            lm_head=self._packed(embedding if self.architecture.tie_embeddings else self._tensor("lm_head")),
        )

    def _expected(self) -> set[str]:
        return {
            name.format(layer=layer)
            for ours in self.shapes
            for name in self.names[ours]
            for layer in range(self.architecture.num_layers)
        }

    def _layer(self, layer: int) -> LayerWeights:
        qk_norm = self.architecture.qk_norm
        return LayerWeights(
            input_norm=self._tensor("input_norm", layer),
            qkv=self._linear("qkv", layer),
            q_norm=self._tensor("q_norm", layer) if qk_norm else None,
            k_norm=self._tensor("k_norm", layer) if qk_norm else None,
            output=self._linear("output", layer),
            mlp_norm=self._tensor("mlp_norm", layer),
            gate_up=self._linear("gate_up", layer),
            down=self._linear("down", layer),
        )

    def _linear(self, ours: str, layer: int) -> LinearWeight:
        bias = self._tensor(f"{ours}.bias", layer) if f"{ours}.bias" in self.shapes else None
        return self._packed(self._tensor(f"{ours}.weight", layer), bias)

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        return LinearWeight(weight, bias)

    def _tensor(self, ours: str, layer: int = 0) -> Tensor:
        names = [name.format(layer=layer) for name in self.names[ours]]
        parts = [self.checkpoint.tensor(name).to(device=self.device, dtype=self.dtype) for name in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tensor.shape != self.shapes[ours]:
            raise CheckpointError(
                f"{' + '.join(names)}: rows and columns {list(tensor.shape)}, but config.json says {self.shapes[ours]}"
            )
        return tensor.contiguous()


def _shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Our parameters and their shapes; those that the architecture does without are left out."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (a.vocab_size, a.hidden_size),
        "final_norm": (a.hidden_size,),
        "input_norm": (a.hidden_size,),
        "qkv.weight": (a.qkv_size, a.hidden_size),
        "output.weight": (a.hidden_size, a.num_heads * a.head_dim),
        "mlp_norm": (a.hidden_size,),
        "gate_up.weight": (2 * a.intermediate_size, a.hidden_size),
        "down.weight": (a.hidden_size, a.intermediate_size),
    }
    if not a.tie_embeddings:
        shapes["lm_head"] = (a.vocab_size, a.hidden_size)
    if a.qkv_bias:
        shapes["qkv.bias"] = (a.qkv_size,)
    if a.output_bias:
        shapes["output.bias"] = (a.hidden_size,)
    if a.mlp_bias:
        shapes |= {"gate_up.bias": (2 * a.intermediate_size,), "down.bias": (a.hidden_size,)}
    if a.qk_norm:
        shapes |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    return shapes
