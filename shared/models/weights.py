"""The parameters of a transformer, taken from a checkpoint by the family's name table and packed for the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from kernels.experts import ExpertWeights
from kernels.linear import LinearWeight, packing, probe_row_invariance
from kernels.quantization import Integers, Quantization
from shared.checkpoint import Checkpoint, CheckpointError, check_names, place_of
from shared.checkpoint.integers import serves
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.shapes import EXPERTS, LINEARS, Shapes, layer_shapes, model_shapes, modules_of
from shared.policies.names import Source, choose
from shared.policies.policy import Policy
from shared.policies.table import POLICIES

_TABLES = ("embedding", "positions", "token_types")  # read row by row
_PLAIN_LINEARS = ("router", "shared_gate", "patches")  # never quantized


@dataclass(frozen=True)
class Norm:
    """weight and bias [width], of RMSNorm or LayerNorm."""

    weight: Tensor
    bias: Tensor | None = None


Part = Tensor | LinearWeight | ExpertWeights | Norm
Record = TypeVar("Record", bound="LayerWeights | ModelWeights")


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
                return LinearWeight(part.plain(), part.bias, how)
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
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, Tensor]) -> ModelWeights:
        """What gave these tensors, over the same memory."""
        dtype = tensors["embedding"].dtype

        def part(name: str, module: str, shapes: Shapes) -> Part:
            if module in _TABLES:
                return tensors[name]
            if _is_norm(module):
                return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
            kind = ExpertWeights if module in EXPERTS else LinearWeight
            found = {field: tensors.get(f"{name}.{field}") for field in kind.FIELDS}
            stored = {field: tensor for field, tensor in found.items() if tensor is not None}
            shape = shapes.get(f"{module}.weight", shapes.get("embedding", ()))
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


def load_weights(
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: QuantizationPlan | None = None,
    policy: Policy | None = None,
) -> ModelWeights:
    """Reads parameter by parameter, so that at most one is held raw and packed at once.

    quantization: default, none of them. policy: whose names the checkpoint has; default: the family's.
    Raises CheckpointError naming parameters that are missing, unexpected or of another shape than the config says, and
    ValueError naming a weight that cannot be cut into the groups it should have.
    """
    policy = policy or POLICIES[architecture.family]
    return _Loader(architecture, policy, checkpoint, dtype, device, quantization or QuantizationPlan()).load()


class _Loader:
    def __init__(
        self,
        architecture: Architecture,
        policy: Policy,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: QuantizationPlan,
    ) -> None:
        self.architecture, self.policy, self.checkpoint = architecture, policy, checkpoint
        self.dtype, self.device, self.quantization = dtype, device, quantization
        self.present = checkpoint.names()
        base = policy.base + "."
        self.base = "" if any(name.startswith(base) for name in self.present) else base
        self.embedding: Tensor | None = None

    def load(self) -> ModelWeights:
        a = self.architecture
        ignored = list(self.policy.ignored)
        if a.tie_embeddings and "lm_head.weight" in self.policy.names:
            # a tied checkpoint may carry the output layer a second time
            ignored += [self._name(name) for source in self.policy.names["lm_head.weight"] for name in source.names]
        check_names(self.present, self._expected(), ignored)
        return assemble(a, self._part)

    def _name(self, name: str) -> str:
        """As this checkpoint calls it: one of a model without its head leaves out the base."""
        return name.removeprefix(self.base) if self.base else name

    def _source(self, ours: str) -> Source:
        names = self.policy.names.get(ours)
        if names is None:
            raise CheckpointError(f"the policy of {self.policy.family} has no name for {ours}")
        named = tuple(Source(tuple(map(self._name, source.names)), source.how) for source in names)
        return choose(named, self.present)

    def _expected(self) -> set[str]:
        a = self.architecture
        expected: set[str] = set()
        for ours in model_shapes(a):
            expected |= set(self._source(ours).names)
        for layer in range(a.num_layers):
            for ours, shape in layer_shapes(a, layer).items():
                count = shape[0] if ours.split(".")[0] in EXPERTS else 1
                for expert in range(count):
                    expected |= set(self._source(ours).at(layer, expert, self._heads(ours)).names)
        return expected

    def _part(self, name: str, module: str, shapes: Shapes) -> Part:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        if module in _TABLES:
            table = self._tensor(module, layer, shapes[module])
            if module == "embedding":
                self.embedding = table
            return table
        if _is_norm(module):
            return self._norm(module, layer, shapes)
        if module in EXPERTS:
            return self._experts(name, module, layer, shapes)
        return self._linear(name, module, layer, shapes)

    def _norm(self, module: str, layer: int, shapes: Shapes) -> Norm:
        shape, offset = shapes[f"{module}.weight"], self.architecture.norm_offset
        weight = self._tensor(f"{module}.weight", layer, shape, torch.float32 if offset else None)
        bias = self._tensor(f"{module}.bias", layer, shape) if f"{module}.bias" in shapes else None
        return Norm(weight + offset if offset else weight, bias)

    def _linear(self, name: str, module: str, layer: int, shapes: Shapes) -> LinearWeight:
        bias_name = f"{module}.bias"
        bias = self._tensor(bias_name, layer, shapes[bias_name]) if bias_name in shapes else None
        if module == "lm_head":
            # A tied embedding stays as it is for lookups, which read a row of it and not all. The integers of a file
            # would bring scales for each block: an eighth more to read for each token, and no better.
            tied = self.architecture.tie_embeddings
            weight = self.embedding if tied else self._tensor("lm_head.weight", layer, shapes["lm_head.weight"])
            assert weight is not None
            return LinearWeight(weight, bias, self.quantization.of(name, weight.shape[1]))
        shape = shapes[f"{module}.weight"]
        how = self.quantization.of(name, shape[1]) if module in LINEARS else None
        integers = None if how is None else self._integers(f"{module}.weight", layer, shape, how)
        if how is not None and integers is not None:
            return LinearWeight.of_integers(integers, bias, self.dtype, dynamic=how.dynamic)
        return LinearWeight(self._tensor(f"{module}.weight", layer, shape), bias, how)

    def _experts(self, name: str, module: str, layer: int, shapes: Shapes) -> ExpertWeights:
        shape = shapes[f"{module}.weight"]
        source = self._source(f"{module}.weight")
        if source.how == "stacked":
            [stored] = source.at(layer).names
            stacked = self.checkpoint.tensor(stored)
            self._check_shape((stored,), stacked.shape, shape)
            each = (self._placed(one) for one in stacked)
        else:
            each = (self._built(source.at(layer, expert), shape[1:]) for expert in range(shape[0]))
        bias, bias_shape = None, shapes.get(f"{module}.bias")
        if bias_shape is not None:
            own = self._source(f"{module}.bias")
            bias = torch.stack([self._built(own.at(layer, expert), bias_shape[1:]) for expert in range(shape[0])])
        return ExpertWeights(each, shape[0], self.quantization.of(name, shape[2]), bias=bias)

    def _integers(self, ours: str, layer: int, shape: tuple[int, ...], how: Quantization) -> Integers | None:
        """The file's own, where all parts have them, of that form and made alike."""
        source = self._source(ours).at(layer)
        parts = [part for name in source.names if (part := self.checkpoint.integers(name)) is not None]
        if source.how != "rows" or len(parts) < len(source.names):
            return None
        if any(part.quantization != parts[0].quantization for part in parts):
            return None
        if not serves(parts[0], how) or any(part.values.shape[1] != parts[0].values.shape[1] for part in parts):
            return None
        offsets = [part.offset for part in parts if part.offset is not None]
        joined = Integers(
            parts[0].bits,
            torch.cat([part.values for part in parts]).to(self.device),
            torch.cat([part.scale for part in parts]).to(self.device),
            torch.cat(offsets).to(self.device) if offsets else None,
            parts[0].floating,
        )
        self._check_shape(source.names, joined.values.shape, shape)
        return joined

    def _tensor(self, ours: str, layer: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self._built(self._source(ours).at(layer, heads=self._heads(ours)), shape, dtype)

    def _heads(self, ours: str) -> int:
        """Of those that a norm of each head is for."""
        return self.architecture.num_heads if ours.startswith("q_") else self.architecture.num_kv_heads

    def _built(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """As the source says, in the model's dtype or another."""
        if source.how == "ones":
            return torch.ones(shape, dtype=dtype or self.dtype, device=self.device)
        tensors = [self.checkpoint.tensor(name) for name in source.names]
        if source.how in ("product", "lifted"):
            table, projection = (tensor.to(self.device, torch.float32) for tensor in tensors)
            joined = self._placed(table @ (projection.T if source.how == "product" else projection), dtype)
        else:
            placed = [self._placed(tensor, dtype) for tensor in tensors]
            if source.how == "columns":
                placed = [tensor.T if tensor.dim() == 2 else tensor for tensor in placed]
            joined = placed[0] if len(placed) == 1 else torch.cat(placed)
            if source.how == "shaped" and joined.numel() == math.prod(shape):
                joined = joined.reshape(shape)
        self._check_shape(source.names, joined.shape, shape)
        return (self._ungrouped(joined) if source.how == "grouped" else joined).contiguous()

    def _placed(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def _ungrouped(self, fused: Tensor) -> Tensor:
        """Rows by key-value head, its queries, key and value -> all queries, all keys, all values."""
        a = self.architecture
        groups = fused.view(a.num_kv_heads, a.num_heads // a.num_kv_heads + 2, a.head_dim, *fused.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])

    def _check_shape(self, names: Sequence[str], shape: Sequence[int], expected: tuple[int, ...]) -> None:
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{' + '.join(names)}: rows and columns {list(shape)}{place_of(self.checkpoint, *names)}, "
                f"but config.json says {expected}"
            )


def packing_of(quantization: QuantizationPlan, dtype: torch.dtype) -> str:
    """How the weights of a plan are packed: another text for another form."""
    return repr((quantization, packing(dtype), "the file's own integers"))


def _is_norm(module: str) -> bool:
    return module not in (*_TABLES, *_PLAIN_LINEARS, *LINEARS, *EXPERTS, "lm_head")


def _tied_head(a: Architecture) -> tuple[str, ...]:
    """The output layer, where no name of a checkpoint stands for it."""
    return ("lm_head",) if a.lm_head and a.tie_embeddings and not a.lm_head_bias else ()


def _parts_of(record: LayerWeights | ModelWeights) -> Iterator[tuple[str, Part]]:
    for field in fields(record):
        part = getattr(record, field.name)
        if part is not None and field.name != "layers":
            yield field.name, part
