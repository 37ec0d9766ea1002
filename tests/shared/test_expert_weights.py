"""A rank's experts: what it reads of a checkpoint, and that they are the rows of the whole model's."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.experts import ExpertWeights
from shared.checkpoint import open_any
from shared.checkpoint.slices import part_of, shape_of
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.model_files import read_json
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights
from shared.parallel.experts import ExpertPartition, ExpertShard
from shared.policies.table import architecture_of
from tests.megatron_moe import MegatronMoe
from tests.tiny_models import tiny_model

EXPERT = re.compile(r"experts\.(\d+)\.|deepspeed_experts\.(\d+)\.")


class Noting:
    """Notes what is read: (name, which of a stack's experts)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._checkpoint = StateDictCheckpoint(tensors, "the model")
        self.read: set[tuple[str, int]] = set()

    def names(self) -> set[str]:
        return self._checkpoint.names()

    def tensor(self, name: str) -> Tensor:
        self.read.add((name, -1))
        return self._checkpoint.tensor(name)

    def integers(self, name: str) -> None:
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._checkpoint, name)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        self.read |= {(name, number) for number in range(start, stop)}
        return part_of(self._checkpoint, name, dim, [range(start, stop)])

    def integer_rows(self, name: str, start: int, stop: int) -> None:
        return None


def separate() -> tuple[dict[str, object], dict[str, Tensor]]:
    """Each expert under a name of its own, with biases."""
    model = MegatronMoe([0, 2, 0, 4], num_experts=[2, 4])
    return model.config, {name: value.float() for name, value in model.state_dict().items()}


def stacked(kind: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """All in one tensor, or as the folder has them."""
    folder = Path(tiny_model(kind))
    checkpoint = open_any(folder)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    for layer in range(3):
        base = f"model.layers.{layer}.block_sparse_moe.experts."
        if f"{base}0.w1.weight" in tensors:
            parts = [[tensors.pop(f"{base}{e}.w{n}.weight") for n in (1, 3, 2)] for e in range(4)]
            mlp = f"model.layers.{layer}.mlp."
            tensors[f"{mlp}experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in parts])
            tensors[f"{mlp}experts.down_proj"] = torch.stack([down for _, _, down in parts])
            tensors[f"{mlp}gate.weight"] = tensors.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    return read_json(folder / "config.json"), tensors


MODELS = {"separate": separate, "stacked": lambda: stacked("mixtral"), "qwen2_moe": lambda: stacked("qwen2_moe")}


def rows_of(weights: ExpertWeights, expert: int) -> Tensor:
    one = weights.expert(expert)
    return one.plain() if one.quantization is None else one.dequantize()


@pytest.mark.parametrize("mode", ["none", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_has_its_rows_of_its_experts(model: str, mode: str) -> None:
    config, tensors = MODELS[model]()
    a, plan = architecture_of(config), QuantizationPlan.of_mode(mode)  # type: ignore[arg-type]

    def loaded(checkpoint: Noting, expert_shard: ExpertShard | None = None) -> ModelWeights:
        return load_weights(
            a, checkpoint, dtype=torch.float32, device="cpu", quantization=plan, expert_shard=expert_shard
        )

    whole = loaded(Noting(tensors))
    for rank in range(4):
        shard = ExpertShard.of(rank, 4, 2)
        partition, checkpoint = ExpertPartition(a, shard), Noting(tensors)
        own = loaded(checkpoint, shard)
        again = ModelWeights.from_tensors(a, own.tensors(), expert_shard=shard)
        for layer in range(a.num_layers):
            for module in ("experts_up", "experts_down"):
                mine, all_of_them, stored = (getattr(w.layers[layer], module) for w in (own, whole, again))
                if not a.has_experts(layer):
                    assert mine is None
                    continue
                numbers = partition.numbers(layer)
                ranges = partition.slice_of(module).ranges
                assert (stored.num_experts, stored.out_features) == (len(numbers), sum(map(len, ranges)))
                for index, number in enumerate(numbers):
                    expected = torch.cat([rows_of(all_of_them, number)[one.start : one.stop] for one in ranges])
                    assert torch.equal(rows_of(mine, index), expected)
                    assert torch.equal(rows_of(stored, index), expected)
                    if mine.bias is not None:
                        own_bias = torch.cat([all_of_them.bias[number][one.start : one.stop] for one in ranges])
                        assert torch.equal(mine.bias[index], own_bias)
        check_read(checkpoint.read, partition, a.num_layers)


def check_read(read: set[tuple[str, int]], partition: ExpertPartition, num_layers: int) -> None:
    """Of the experts of each layer no others than this rank's."""
    for layer in range(num_layers):
        found: set[int] = set()
        for name, part in read:
            if f"layers.{layer}." not in name or "experts" not in name:
                continue
            match = EXPERT.search(name)
            found.add(int(match[1] or match[2]) if match else part)
        assert found == set(partition.numbers(layer)), layer


class Whole:
    """A checkpoint that reads no parts."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self.reads = tensors, Counter[str]()

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self._tensors[name]

    def integers(self, name: str) -> None:
        return None


def test_a_stack_that_is_not_read_in_parts_is_read_once() -> None:
    config, tensors = stacked("mixtral")
    a, checkpoint = architecture_of(config), Whole(tensors)
    shard = ExpertShard.of(1, 2, 2)
    own = load_weights(a, checkpoint, dtype=torch.float32, device="cpu", expert_shard=shard)
    stacks = [name for name in tensors if "experts." in name]
    assert len(stacks) == 6
    assert all(checkpoint.reads[name] == 1 for name in stacks)
    experts = own.layers[2].experts_down
    assert experts
    assert torch.equal(rows_of(experts, 1), tensors["model.layers.2.mlp.experts.down_proj"][3])
