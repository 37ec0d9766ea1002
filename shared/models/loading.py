"""Reads a model's weights from a checkpoint, by the family's table of names, and packs them for the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.experts import ExpertWeights
from kernels.linear import LinearWeight, linear, packing
from kernels.quantization import Integers, Quantization
from shared.checkpoint import Checkpoint, CheckpointError, check_names, place_of
from shared.checkpoint.integers import serves
from shared.checkpoint.slices import Sliced, integer_rows_of, joined_rows, part_of, shape_of, shared_out
from shared.models.architecture import Architecture
from shared.models.quantization import QuantizationPlan
from shared.models.shapes import EXPERTS, LINEARS, Shapes, layer_shapes, model_shapes
from shared.models.weights import TABLES, ModelWeights, Norm, Part, assemble, is_norm, layer_of
from shared.parallel.experts import ExpertPartition, ExpertShard, expert_shard_of
from shared.parallel.partition import Partition, Slice, grouped_qkv_rows, whole_heads
from shared.parallel.sharding import Shard
from shared.policies.names import Source, choose
from shared.policies.policy import Policy
from shared.policies.table import POLICIES


def load_weights(
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: QuantizationPlan | None = None,
    policy: Policy | None = None,
    shard: Shard | None = None,
    expert_shard: ExpertShard | None = None,
) -> ModelWeights:
    """Reads parameter by parameter, so that at most one is held raw and packed at once.

    quantization: default, none of them. policy: whose names the checkpoint has; default: the family's. shard: reads
    what that rank has of the model (shared/parallel/partition.py), and no more of the checkpoint; default: all of it.
    expert_shard: likewise of its experts (shared/parallel/experts.py); default: the shard's share of each of them.

    Raises CheckpointError naming parameters that are missing, unexpected or of another shape than the config says, and
    ValueError naming a weight that cannot be cut into the groups it should have, or what of a model cannot be cut for
    so many ranks.
    """
    policy = policy or POLICIES[architecture.family]
    partition = shard and Partition(architecture, shard)
    plan = quantization or QuantizationPlan()
    expert_shard = expert_shard or expert_shard_of(architecture, shard)
    experts = expert_shard and ExpertPartition(architecture, expert_shard)
    return _Loader(architecture, policy, checkpoint, dtype, device, plan, partition, experts).load()


def packing_of(quantization: QuantizationPlan, dtype: torch.dtype) -> str:
    """How the weights of a plan are packed: another text for another form."""
    return repr((quantization, packing(dtype), "the file's own integers"))


class _Loader:
    def __init__(
        self,
        architecture: Architecture,
        policy: Policy,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: QuantizationPlan,
        partition: Partition | None,
        experts: ExpertPartition | None,
    ) -> None:
        self.architecture, self.policy, self.checkpoint = architecture, policy, checkpoint
        self.dtype, self.device, self.quantization = dtype, device, quantization
        self.partition, self.experts = partition, experts
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
        layer = layer_of(name)
        if module in TABLES:
            table = self._tensor(module, layer, shapes[module])
            if module == "embedding":
                self.embedding = table
            return table
        if is_norm(module):
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
        if module == "lm_head":
            bias = self._bias(module, layer, shapes, is_plain=True)
            # A tied embedding stays as it is for lookups, which read a row of it and not all. The integers of a file
            # would bring scales for each block: an eighth more to read for each token, and no better.
            tied = self.architecture.tie_embeddings
            weight = self.embedding if tied else self._tensor("lm_head.weight", layer, shapes["lm_head.weight"])
            assert weight is not None
            how = self.quantization.of(name, weight.shape[1])
            return LinearWeight(weight, bias, how).as_part_of(self.architecture.vocab_size)
        shape = shapes[f"{module}.weight"]
        how = self.quantization.of(name, shape[1]) if module in LINEARS else None
        bias = self._bias(module, layer, shapes, is_plain=how is None)
        integers = None if how is None else self._integers(f"{module}.weight", layer, shape, how)
        if how is not None and integers is not None:
            return LinearWeight.of_integers(integers, bias, self.dtype, dynamic=how.dynamic).as_part_of(shape[0])
        weight = self._tensor(f"{module}.weight", layer, shape, is_plain=how is None)
        return LinearWeight(weight, bias, how).as_part_of(shape[0])

    def _bias(self, module: str, layer: int, shapes: Shapes, *, is_plain: bool) -> Tensor | None:
        """Of outputs that are sums over the ranks one rank alone adds it."""
        name = f"{module}.bias"
        if name not in shapes:
            return None
        if self.partition and self.partition.splits_inputs(module, is_plain=is_plain) and self.partition.shard.rank:
            return None
        return self._tensor(name, layer, shapes[name], is_plain=is_plain)

    def _experts(self, name: str, module: str, layer: int, shapes: Shapes) -> ExpertWeights:
        shape, biases = shapes[f"{module}.weight"], shapes.get(f"{module}.bias")
        numbers, own = range(shape[0]), None
        if self.experts is not None:
            numbers, own = self.experts.numbers(layer), self.experts.slice_of(module)
        source = self._source(f"{module}.weight").at(layer)
        if source.how == "stacked":
            [stored] = source.names
            # all of them at once where the checkpoint cannot read a part
            stack = None if isinstance(self.checkpoint, Sliced) else self.checkpoint.tensor(stored)
            self._check_shape((stored,), shape_of(self.checkpoint, stored) if stack is None else stack.shape, shape)
            each = (self._of_stack(stored, stack, number, own) for number in numbers)
        else:
            each = (self._of_expert(f"{module}.weight", layer, number, shape[1:], own) for number in numbers)
        bias = None
        if biases is not None:
            of_each = [self._of_expert(f"{module}.bias", layer, number, biases[1:], own) for number in numbers]
            bias = torch.stack(of_each)
        return ExpertWeights(each, len(numbers), self.quantization.of(name, shape[2]), bias=bias)

    def _of_stack(self, name: str, stack: Tensor | None, number: int, own: Slice | None) -> Tensor:
        """An expert's weight of those of all of them, which are read one by one if they are not in memory."""
        one = [range(number, number + 1)]
        [whole] = part_of(self.checkpoint, name, 0, one) if stack is None else stack[number : number + 1]
        rows = [whole] if own is None else [whole[part.start : part.stop] for part in own.ranges]
        return self._placed(rows[0] if len(rows) == 1 else torch.cat(rows))

    def _of_expert(self, ours: str, layer: int, number: int, shape: tuple[int, ...], own: Slice | None) -> Tensor:
        return self._built(self._source(ours).at(layer, number), shape, own=own)

    def _integers(self, ours: str, layer: int, shape: tuple[int, ...], how: Quantization) -> Integers | None:
        """The file's own, where all parts have them, of that form and made alike."""
        source = self._source(ours).at(layer)
        own = self._slice(ours, is_plain=False)
        if source.how != "rows":
            return None
        if own is None:
            found = [self.checkpoint.integers(name) for name in source.names]
        else:
            lengths = self._lengths(source, [shape_of(self.checkpoint, name) for name in source.names], shape)
            shares = shared_out(own.ranges, lengths)
            found = [integer_rows_of(self.checkpoint, source.names[which], rows) for which, rows in shares]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or any(part.quantization != parts[0].quantization for part in parts):
            return None
        if not serves(parts[0], how) or any(part.values.shape[1] != parts[0].values.shape[1] for part in parts):
            return None
        joined = joined_rows(parts)
        self._check_shape(source.names, joined.values.shape, shape if own is None else own.shape(shape))
        offset = None if joined.offset is None else joined.offset.to(self.device)
        return replace(joined, values=joined.values.to(self.device), scale=joined.scale.to(self.device), offset=offset)

    def _tensor(
        self,
        ours: str,
        layer: int,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        *,
        is_plain: bool = True,
    ) -> Tensor:
        source = self._source(ours).at(layer, heads=self._heads(ours))
        return self._built(source, shape, dtype, self._slice(ours, is_plain=is_plain))

    def _slice(self, ours: str, *, is_plain: bool) -> Slice | None:
        return self.partition.slice_of(ours, is_plain=is_plain) if self.partition else None

    def _heads(self, ours: str) -> int:
        """Of those that a norm of each head is for."""
        return self.architecture.num_heads if ours.startswith("q_") else self.architecture.num_kv_heads

    def _built(
        self, source: Source, shape: tuple[int, ...], dtype: torch.dtype | None = None, own: Slice | None = None
    ) -> Tensor:
        """As the source says, in the model's dtype or another; of `shape` all, or this rank's own."""
        if source.how == "ones":
            return torch.ones(own.shape(shape) if own else shape, dtype=dtype or self.dtype, device=self.device)
        if source.how in ("product", "lifted"):
            return self._product(source, shape, dtype, own)
        if source.how == "shaped":
            [name] = source.names
            whole = self.checkpoint.tensor(name)
            if whole.numel() != math.prod(shape):
                self._check_shape(source.names, whole.shape, shape)
            return self._placed(whole.reshape(shape), dtype).contiguous()
        is_turned = source.how == "columns" and len(shape) == 2
        if own is None:
            tensors = [self.checkpoint.tensor(name) for name in source.names]
            self._lengths(source, [tuple(tensor.shape) for tensor in tensors], shape)
            parts = [self._placed(tensor, dtype) for tensor in tensors]
            if source.how == "grouped":
                ranges = grouped_qkv_rows(self.architecture, whole_heads(self.architecture))
                parts = [parts[0][one.start : one.stop] for one in ranges]
        else:
            parts = [self._placed(part, dtype) for part in self._own_parts(source, shape, own, is_turned)]
        if is_turned:
            parts = [part.T for part in parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def _own_parts(self, source: Source, shape: tuple[int, ...], own: Slice, is_turned: bool) -> Iterator[Tensor]:
        """This rank's part of each tensor of a source that has one."""
        lengths = self._lengths(source, [shape_of(self.checkpoint, name) for name in source.names], shape)
        ranges, dim = own.ranges, 1 - own.dim if is_turned else own.dim
        if source.how == "grouped" and self.partition:
            ranges = grouped_qkv_rows(self.architecture, self.partition.heads[self.partition.shard.rank])
        pieces = shared_out(ranges, lengths) if own.dim == 0 else ((which, ranges) for which in range(len(lengths)))
        for which, rows in pieces:
            yield part_of(self.checkpoint, source.names[which], dim, rows)

    def _product(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype | None, own: Slice | None) -> Tensor:
        """Of a table [vocab, width] and a projection; a row has the same bits in any part of the table."""
        table, projection = source.names
        rows, width = shape_of(self.checkpoint, table)
        factor = self.checkpoint.tensor(projection).to(self.device, torch.float32)
        factor = (factor if source.how == "product" else factor.T).contiguous()
        self._check_shape(source.names, (rows, len(factor)) if width == factor.shape[1] else (rows, width), shape)
        part = part_of(self.checkpoint, table, 0, own.ranges if own else [range(rows)])
        return self._placed(linear(part.to(self.device, torch.float32).contiguous(), LinearWeight(factor)), dtype)

    def _lengths(self, source: Source, shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> list[int]:
        """How many of our outputs each tensor of a source has. CheckpointError unless they make up `shape`."""
        if source.how == "columns":
            shapes = [one[::-1] for one in shapes]
        odd = next((one for one in shapes if not one or one[1:] != shape[1:]), None)
        self._check_shape(source.names, (sum(one[0] for one in shapes), *shape[1:]) if odd is None else odd, shape)
        return [one[0] for one in shapes]

    def _placed(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def _check_shape(self, names: Sequence[str], shape: Sequence[int], expected: tuple[int, ...]) -> None:
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{' + '.join(names)}: rows and columns {list(shape)}{place_of(self.checkpoint, *names)}, "
                f"but config.json says {expected}"
            )
