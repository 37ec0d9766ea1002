"""A rank's weights: what it reads of a checkpoint, and that they are the rows and columns of the whole model's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor

from kernels.linear import LinearWeight
from kernels.quantization import Integers
from shared.checkpoint import Checkpoint, CheckpointError, GgufCheckpoint, open_any
from shared.checkpoint.slices import integer_rows_of, part_of, shape_of
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.config import QuantizationMode
from shared.model_files import read_json
from shared.models.architecture import Architecture
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights, Norm
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard
from shared.policies.table import architecture_of
from tests.live_bytes import LiveBytes, bytes_of
from tests.tiny_models import tiny_model, write_gguf

# A source of each kind: joined rows, columns, rows by group, a product, of several layers' names, fused already.
KINDS = ("llama-untied-biased", "gpt2", "bloom", "opt-post-norm", "stablelm-parallel", "phi3")
WHOLE = ("norm", "ln_", "layernorm", "position", "wpe", "project_", "router")


class Counting:
    """Counts the bytes that are read of each parameter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.read: Counter[str] = Counter()

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def tensor(self, name: str) -> Tensor:
        return self._counted(name, self._checkpoint.tensor(name))

    def integers(self, name: str) -> Integers | None:
        integers = self._checkpoint.integers(name)
        return integers and self._counted_integers(name, integers)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._checkpoint, name)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._counted(name, part_of(self._checkpoint, name, dim, [range(start, stop)]))

    def integer_rows(self, name: str, start: int, stop: int) -> Integers | None:
        integers = integer_rows_of(self._checkpoint, name, [range(start, stop)])
        return integers and self._counted_integers(name, integers)

    def _counted(self, name: str, tensor: Tensor) -> Tensor:
        self.read[name] += tensor.numel() * tensor.element_size()
        return tensor

    def _counted_integers(self, name: str, integers: Integers) -> Integers:
        self._counted(name, integers.values)
        return integers


def opened(kind: str) -> tuple[Architecture, Checkpoint]:
    folder = tiny_model(kind)
    return architecture_of(read_json(folder / "config.json")), open_any(folder)


def loaded(
    a: Architecture, checkpoint: Checkpoint, shard: Shard | None = None, mode: QuantizationMode = "none"
) -> ModelWeights:
    plan = QuantizationPlan.of_mode(mode)
    return load_weights(a, checkpoint, dtype=torch.float32, device="cpu", quantization=plan, shard=shard)


def numbers_of(weights: ModelWeights) -> dict[str, Tensor]:
    """Every parameter as a tensor of its own shape, by our name."""
    numbers: dict[str, Tensor] = {}
    for name, part in weights._parts():
        if isinstance(part, Tensor):
            numbers[name] = part
        elif isinstance(part, Norm):
            numbers |= {f"{name}.weight": part.weight, **({} if part.bias is None else {f"{name}.bias": part.bias})}
        elif isinstance(part, LinearWeight):
            numbers[f"{name}.weight"] = part.plain() if part.quantization is None else part.dequantize()
            numbers |= {} if part.bias is None else {f"{name}.bias": part.bias}
    return numbers


def sliced(partition: Partition, name: str, whole: Tensor, *, is_plain: bool) -> Tensor:
    ours = name.removeprefix("layers.").partition(".")[2] if name.startswith("layers.") else name
    own = partition.slice_of(ours, is_plain=is_plain)
    if own is None:
        return whole
    return torch.cat([whole.narrow(own.dim, part.start, len(part)) for part in own.ranges], own.dim)


@pytest.mark.parametrize("splits_inputs", [False, True])
@pytest.mark.parametrize("mode", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_slices_of_the_whole_models(kind: str, mode: QuantizationMode, splits_inputs: bool):
    """Quantized, too: the same integers with the same scales."""
    a, checkpoint = opened(kind)
    whole = numbers_of(loaded(a, checkpoint, mode=mode))
    for rank in range(2):
        shard = Shard(rank, 2, splits_inputs=splits_inputs)
        weights = loaded(a, checkpoint, shard, mode)
        own = numbers_of(weights)
        partition = Partition(a, shard)
        lacking = {name for name in whole if name not in own}
        # rank 0 alone adds the bias of sums
        sums = {name for name in whole if name.endswith(("output.bias", "down.bias"))}
        assert lacking == (sums if splits_inputs and mode == "none" and rank else set())
        for name, tensor in own.items():
            assert torch.equal(tensor, sliced(partition, name, whole[name], is_plain=mode == "none")), name
        # and stored and mapped again, as workers of a host share them
        again = numbers_of(ModelWeights.from_tensors(a, weights.tensors(), shard=shard))
        assert again.keys() == own.keys()
        assert all(torch.equal(again[name], own[name]) for name in own)


@pytest.mark.parametrize("mode", ["none", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_its_slices_and_no_more(kind: str, mode: QuantizationMode):
    a, checkpoint = opened(kind)
    ranks = []
    for rank in range(2):
        counting = Counting(checkpoint)
        loaded(a, counting, Shard(rank, 2), mode)
        ranks.append(counting.read)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        num_bytes = tensor.numel() * tensor.element_size()
        read = [rank[name] for rank in ranks]
        if not any(read):
            assert a.tie_embeddings, name  # the output layer, a second time
            continue
        if any(word in name for word in WHOLE) and "norms." not in name:
            assert read == [num_bytes] * 2, name
        elif kind == "opt-post-norm" and "embed_tokens" in name:
            assert read == [num_bytes] * 2, name  # half for what tokens become, half for what becomes tokens
        else:
            assert sum(read) == num_bytes, name


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_a_rank_never_holds_more_than_its_share_and_a_part(mode: QuantizationMode):
    a, checkpoint = opened("llama-untied-biased")
    whole = bytes_of(loaded(a, checkpoint, mode=mode).tensors())
    largest = max(checkpoint.tensor(name).numel() * 4 for name in checkpoint.names())
    with LiveBytes() as live:
        weights = loaded(a, checkpoint, Shard(1, 2), mode)
    share = bytes_of(weights.tensors())
    assert share < 0.6 * whole
    # half of a parameter, in float64 while it is quantized
    assert live.peak < share + 1.25 * largest


def test_stored_integers_are_read_by_rows(tmp_path: Path):
    """Of a GGUF file those of a rank's blocks are turned into numbers, and no others."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", matrices=GGMLQuantizationType.Q8_0)
    a, _ = opened("llama")
    checkpoint = GgufCheckpoint(path)
    for name in sorted(checkpoint.names()):
        whole = checkpoint.tensor(name)
        rows = len(whole) // 2
        assert checkpoint.shape(name) == tuple(whole.shape)
        assert torch.equal(checkpoint.part(name, 0, rows, 2 * rows), whole[rows:]), name
        # and of rows within a head, whose order differs there
        assert torch.equal(checkpoint.part(name, 0, 3, 7), whole[3:7]), name
        integers = checkpoint.integers(name)
        for start, stop in ((rows, 2 * rows), (3, 7)):
            part = checkpoint.integer_rows(name, start, stop)
            if integers is None or part is None:
                assert integers is part is None
                continue
            assert torch.equal(part.values, integers.values[start:stop])
            assert torch.equal(part.scale, integers.scale[start:stop])
    for mode in ("none", "int8"):
        whole = numbers_of(loaded(a, checkpoint, mode=mode))
        for rank in range(2):
            counting, shard = Counting(checkpoint), Shard(rank, 2)
            own = numbers_of(loaded(a, counting, shard, mode))
            for name, tensor in own.items():
                assert torch.equal(tensor, sliced(Partition(a, shard), name, whole[name], is_plain=mode == "none"))
            name = "model.layers.0.mlp.up_proj.weight"
            assert counting.read[name] == (64 if rank == 0 else 32) * 64 * (4 if mode == "none" else 1)


def test_a_part_of_a_gguf_tensor_is_dequantised_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", matrices=GGMLQuantizationType.Q4_1)
    checkpoint, blocks = GgufCheckpoint(path), []
    dequantize = gguf.dequantize

    def counted(data, kind):
        blocks.append(data.size // 20)  # of 32 values each
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", counted)
    checkpoint.part("model.layers.0.self_attn.q_proj.weight", 0, 16, 32)
    assert blocks == [16 * 64 // 32]


def test_slices_of_a_state_dict_and_of_a_file_are_the_same():
    folder = tiny_model("llama-untied-biased")
    stored = open_any(folder)
    in_memory = StateDictCheckpoint(load_file(folder / "model.safetensors"), "the model")
    name = "model.layers.1.mlp.down_proj.weight"
    for dim, ranges in ((0, [range(3, 9)]), (1, [range(2, 5), range(90, 96)])):
        parts = [part_of(checkpoint, name, dim, ranges) for checkpoint in (stored, in_memory)]
        whole = stored.tensor(name)
        expected = torch.cat([whole.narrow(dim, one.start, len(one)) for one in ranges], dim)
        assert all(torch.equal(part, expected) for part in parts)
    assert shape_of(stored, name) == shape_of(in_memory, name) == (64, 96)
    for checkpoint in (stored, in_memory):
        with pytest.raises(KeyError, match="missing"):
            part_of(checkpoint, "missing", 0, [range(2)])


@pytest.mark.parametrize("kind", ["llama-untied-biased", "gpt2", "bloom"])
def test_a_checkpoint_of_another_size_is_told_by_every_rank(kind: str):
    a, checkpoint = opened(kind)
    other = replace(a, intermediate_size=a.intermediate_size + 32)
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"but config\.json says"):
            loaded(other, checkpoint, Shard(rank, 2))
