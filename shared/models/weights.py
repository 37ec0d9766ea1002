"""The parameters of a transformer as the ops read them: those of a layer, of a model, and all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor

from kernels.experts import ExpertWeights
from kernels.linear import LinearWeight, probe_row_invariance
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.shapes import EXPERTS, LINEARS, Shapes, layer_shapes, model_shapes, modules_of
from shared.parallel.experts import ExpertPartition, ExpertShard, expert_shard_of
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard

TABLES = ("embedding", "positions", "token_types")  # read row by row
PLAIN_LINEARS = ("router", "shared_gate", "patches")  # never quantized


@dataclass(frozen=True)
class Norm:
    """weight and bias [width], of RMSNorm or LayerNorm."""

    weight: Tensor
    bias: Tensor | None = None


Part = Tensor | LinearWeight | ExpertWeights | Norm


@dataclass(frozen=True)
class LayerWeights:
    """One layer. What the architecture does without is None; shapes.py has the shapes."""

    qkv: LinearWeight
    output: LinearWeight
    attention_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_norm: Norm | None = None
    up: LinearWeight | None = None  # gate first, then up, where the MLP is gated
    down: LinearWeight | None = None
    mlp_output_norm: Norm | None = None
    router: LinearWeight | None = None
    experts_up: ExpertWeights | None = None
    experts_down: ExpertWeights | None = None
    shared_up: LinearWeight | None = None
    shared_down: LinearWeight | None = None
    shared_gate: LinearWeight | None = None


@dataclass(frozen=True)
class ModelWeights:
    """All of a model's."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    positions: Tensor | None = None
    token_types: Tensor | None = None
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    lm_head: LinearWeight | None = None  # [vocab, hidden]
    patches: LinearWeight | None = None

    def probe(self) -> None:
        """RuntimeError if this CPU's matmuls cannot keep a row's bits free of the rows beside it."""
        for _, part in (*_parts_of(self.layers[0]), *_parts_of(self)):
            if isinstance(part, LinearWeight):
                probe_row_invariance(part)

    def quantized(self, plan: QuantizationPlan) -> ModelWeights:
        """What `load_weights` makes of floats by that plan, bit for bit, of weights that are in memory already.

        Raises ValueError naming a weight that is quantized, or that cannot be cut into the groups it should have.
        """

        def changed(name: str, part: Part) -> Part:
            is_quantizable = name.rpartition(".")[2] in (*LINEARS, *EXPERTS, "lm_head")
            if not is_quantizable or not isinstance(part, LinearWeight | ExpertWeights):
                return part
            if part.quantization is not None:
                raise ValueError(f"{name}: {part.description}, and cannot be quantized again")
            how = plan.of(name, part.in_features)
            if how is None:
                return part
            if isinstance(part, LinearWeight):
                return LinearWeight(part.plain(), part.bias, how).as_part_of(part.of_outputs)
            each = (part.expert(index).plain() for index in range(part.num_experts))
            return ExpertWeights(each, part.num_experts, how, bias=part.bias)

        layers = (
            replace(layer, **{name: changed(f"layers.{index}.{name}", part) for name, part in _parts_of(layer)})
            for index, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(layers), **{name: changed(name, part) for name, part in _parts_of(self)})

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be stored."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts():
            if isinstance(part, Tensor):
                tensors[name] = part
            elif isinstance(part, Norm):
                tensors[f"{name}.weight"] = part.weight
                if part.bias is not None:
                    tensors[f"{name}.bias"] = part.bias
            else:
                tensors |= {f"{name}.{field}": tensor for field, tensor in part.tensors().items()}
        return tensors

    @classmethod
    def from_tensors(
        cls,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        *,
        shard: Shard | None = None,
        expert_shard: ExpertShard | None = None,
    ) -> ModelWeights:
        """What gave these tensors, over the same memory. shard, expert_shard: as they were loaded."""
        dtype = tensors["embedding"].dtype
        partition = shard and Partition(architecture, shard)
        expert_shard = expert_shard or expert_shard_of(architecture, shard)
        experts = expert_shard and ExpertPartition(architecture, expert_shard)

        def part(name: str, module: str, shapes: Shapes) -> Part:
            if module in TABLES:
                return tensors[name]
            if is_norm(module):
                return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
            kind = ExpertWeights if module in EXPERTS else LinearWeight
            found = {field: tensors.get(f"{name}.{field}") for field in kind.FIELDS}
            stored = {field: tensor for field, tensor in found.items() if tensor is not None}
            shape = shapes.get(f"{module}.weight", shapes.get("embedding", ()))
            if experts is not None and module in EXPERTS:
                shape = experts.shape(module, layer_of(name), shape)
            elif partition is not None:
                own = partition.slice_of(f"{module}.weight", is_plain="scale" not in stored)
                outputs, shape = shape[0], shape if own is None else own.shape(shape)
                if kind is LinearWeight:
                    return kind.from_tensors(stored, shape, dtype).as_part_of(outputs)
            return kind.from_tensors(stored, shape, dtype)

        return assemble(architecture, part)

    def _parts(self) -> Iterator[tuple[str, Part]]:
        yield from _parts_of(self)
        for index, layer in enumerate(self.layers):
            for name, part in _parts_of(layer):
                yield f"layers.{index}.{name}", part


def assemble(a: Architecture, part_of: Callable[[str, str, Shapes], Part]) -> ModelWeights:
    """A model of the parts that `part_of` gives for (name, module, shapes of the module's own level)."""
    layers: list[LayerWeights] = []
    shapes = model_shapes(a)
    # first, so that a checkpoint of another size is found out before its layers are packed
    top = {module: part_of(module, module, shapes) for module in (*modules_of(shapes), *_tied_head(a))}
    for layer in range(a.num_layers):
        own = layer_shapes(a, layer)
        parts = {module: part_of(f"layers.{layer}.{module}", module, own) for module in modules_of(own)}
        layers.append(LayerWeights(**parts))  # pyright: ignore[reportArgumentType] - by the shapes
    return ModelWeights(layers=tuple(layers), **top)  # pyright: ignore[reportArgumentType]


def layer_of(name: str) -> int:
    """The number in `layers.N...`; 0 of what is of no layer."""
    return int(name.split(".")[1]) if name.startswith("layers.") else 0


def is_norm(module: str) -> bool:
    return module not in (*TABLES, *PLAIN_LINEARS, *LINEARS, *EXPERTS, "lm_head")


def _tied_head(a: Architecture) -> tuple[str, ...]:
    """The output layer, where no name of a checkpoint stands for it."""
    return ("lm_head",) if a.lm_head and a.tie_embeddings and not a.lm_head_bias else ()


def _parts_of(record: LayerWeights | ModelWeights) -> Iterator[tuple[str, Part]]:
    for field in fields(record):
        part = getattr(record, field.name)
        if part is not None and field.name != "layers":
            yield field.name, part
