"""The parameters of a decoder, taken from a checkpoint by the family's name table and packed for the ops."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.linear import LinearWeight, packing, probe_row_invariance
from kernels.quantization import Integers, Quantization
from shared.checkpoint import Checkpoint, CheckpointError, check_names, place_of
from shared.config import QuantizationMode
from shared.models.architecture import Architecture
from shared.policies.table import POLICIES

# what weights and activations may be
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Left over in old checkpoints: frequencies, which the config gives.
_IGNORED = (r".*rotary_emb\.inv_freq",)
# Input features that share a scale and an offset, as in GGUF's Q4_1, of which the default model's file is made. Groups
# of 64 without offsets read a quarter less, and raised that model's perplexity by 40%.
_INT4_GROUP, _INT4_GROUP_LEAST = 32, 8


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

    def probe(self) -> None:
        """RuntimeError if this CPU's matmuls cannot keep a row's bits free of the rows beside it."""
        first = self.layers[0]
        for weight in (first.qkv, first.output, first.gate_up, first.down, self.lm_head):
            probe_row_invariance(weight)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be stored."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts().items():
            if isinstance(part, LinearWeight):
                tensors |= {f"{name}.{field}": tensor for field, tensor in part.tensors().items()}
            else:
                tensors[name] = part
        return tensors

    @classmethod
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, Tensor]) -> "DecoderWeights":
        """What gave these tensors, over the same memory."""
        shapes, dtype = _shapes(architecture), tensors["embedding"].dtype

        def linear(name: str, shape: tuple[int, ...]) -> LinearWeight:
            found = {field: tensors.get(f"{name}.{field}") for field in LinearWeight.FIELDS}
            parts = {field: tensor for field, tensor in found.items() if tensor is not None}
            return LinearWeight.from_tensors(parts, shape, dtype)

        def of_layer(index: int, name: str) -> LinearWeight:
            return linear(f"layers.{index}.{name}", shapes[f"{name}.weight"])

        def layer(index: int) -> LayerWeights:
            name = f"layers.{index}"
            return LayerWeights(
                input_norm=tensors[f"{name}.input_norm"],
                qkv=of_layer(index, "qkv"),
                q_norm=tensors.get(f"{name}.q_norm"),
                k_norm=tensors.get(f"{name}.k_norm"),
                output=of_layer(index, "output"),
                mlp_norm=tensors[f"{name}.mlp_norm"],
                gate_up=of_layer(index, "gate_up"),
                down=of_layer(index, "down"),
            )

        return cls(
            embedding=tensors["embedding"],
            layers=tuple(layer(index) for index in range(architecture.num_layers)),
            final_norm=tensors["final_norm"],
            lm_head=linear("lm_head", shapes["embedding"]),
        )

    def _parts(self) -> dict[str, Tensor | LinearWeight]:
        parts = {"embedding": self.embedding, "final_norm": self.final_norm, "lm_head": self.lm_head}
        for index, layer in enumerate(self.layers):
            for field in fields(layer):
                if (part := getattr(layer, field.name)) is not None:
                    parts[f"layers.{index}.{field.name}"] = part
        return parts


def load_weights(
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: QuantizationMode = "none",
) -> DecoderWeights:
    """Reads parameter by parameter, so that at most one is held raw and packed at once.

    Raises CheckpointError naming parameters that are missing, unexpected or of another shape than the config says.
    """
    return _Loader(architecture, checkpoint, dtype, device, quantization).load()


class _Loader:
    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: QuantizationMode,
    ) -> None:
        self.architecture, self.checkpoint, self.dtype, self.device = architecture, checkpoint, dtype, device
        self.quantization: QuantizationMode = quantization
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
            lm_head=self._lm_head(embedding if self.architecture.tie_embeddings else self._tensor("lm_head")),
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
        how = _quantization(self.quantization, self.shapes[f"{ours}.weight"][1])
        integers = None if how is None else self._integers(f"{ours}.weight", layer, how.bits)
        if integers is not None:
            return LinearWeight.of_integers(integers, bias, self.dtype)
        return LinearWeight(self._tensor(f"{ours}.weight", layer), bias, how)

    def _lm_head(self, weight: Tensor) -> LinearWeight:
        # A tied embedding stays as it is for lookups, which read a row of it and not all. The integers of a file would
        # bring scales for each block: an eighth more to read for each token, and no better.
        return LinearWeight(weight, None, _lm_head_quantization(self.quantization))

    def _integers(self, ours: str, layer: int, bits: int) -> Integers | None:
        """The file's own, where all parts have them, of so many bits and made alike."""
        names = [name.format(layer=layer) for name in self.names[ours]]
        parts = [part for name in names if (part := self.checkpoint.integers(name)) is not None]
        if len(parts) < len(names) or any(part.quantization != parts[0].quantization for part in parts):
            return None
        if parts[0].bits != bits or any(part.values.shape[1] != parts[0].values.shape[1] for part in parts):
            return None
        offsets = [part.offset for part in parts if part.offset is not None]
        joined = Integers(
            parts[0].bits,
            torch.cat([part.values for part in parts]).to(self.device),
            torch.cat([part.scale for part in parts]).to(self.device),
            torch.cat(offsets).to(self.device) if offsets else None,
        )
        self._check_shape(names, joined.values.shape, ours)
        return joined

    def _tensor(self, ours: str, layer: int = 0) -> Tensor:
        names = [name.format(layer=layer) for name in self.names[ours]]
        parts = [self.checkpoint.tensor(name).to(device=self.device, dtype=self.dtype) for name in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._check_shape(names, tensor.shape, ours)
        return tensor.contiguous()

    def _check_shape(self, names: Sequence[str], shape: Sequence[int], ours: str) -> None:
        if tuple(shape) != self.shapes[ours]:
            raise CheckpointError(
                f"{' + '.join(names)}: rows and columns {list(shape)}{place_of(self.checkpoint, *names)}, "
                f"but config.json says {self.shapes[ours]}"
            )


def packing_of(mode: QuantizationMode, dtype: torch.dtype) -> str:
    """How the weights of a mode are packed: another text for another form."""
    return repr((_quantization(mode, 1 << 16), _lm_head_quantization(mode), packing(dtype), "the file's own integers"))


def _lm_head_quantization(mode: QuantizationMode) -> Quantization | None:
    """int8 in both modes: its errors go straight to the sampler."""
    return None if mode == "none" else Quantization(8)


def _quantization(mode: QuantizationMode, in_features: int) -> Quantization | None:
    """int8 for each row; int4 with offsets for each group, or for each row where it cannot be cut into groups."""
    if mode == "int4":
        group = math.gcd(_INT4_GROUP, in_features)
        return Quantization(4, group if group >= _INT4_GROUP_LEAST else None, symmetric=False)
    return Quantization(8) if mode == "int8" else None


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
