"""A model whose experts lie on several ranks, and what each rank checks of it. Free of transformers, which takes every
process seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.batch import BatchEntry
from shared.config import load_config
from shared.engine import Engine, EnginePlan, InferenceEngine, init_inference
from shared.model_store import ModelStore
from shared.parallel.expert_groups import ExpertGroups
from shared.parallel.experts import ExpertShard
from shared.parallel.group import Group
from shared.parallel.sharding import Shard

BLOCK_TOKENS = 16
TOKENS = torch.randint(3, 90, (2, 19), generator=torch.Generator().manual_seed(8))


@dataclass(frozen=True)
class Case:
    """A model, and on how many ranks its dense parts and its experts lie: the rest of them share experts."""

    model: str
    quantization: str = "none"
    dtype: str = "float32"
    tp_size: int = 1
    ep_size: int = 1

    @property
    def name(self) -> str:
        return f"{Path(self.model).name} {self.dtype} {self.quantization} tp {self.tp_size} ep {self.ep_size}"


def plan_of(case: Case, shard: Shard | None = None, expert_shard: ExpertShard | None = None) -> EnginePlan:
    overrides = {
        "model": case.model,
        "dtype": case.dtype,
        "quantization": case.quantization,
        "threads": 1,
        "decode": {"num_blocks": 24, "max_running": 8, "block_tokens": BLOCK_TOKENS},
    }
    config = load_config(None, overrides)
    return EnginePlan.of(config, config.decode, ModelStore().resolve(config.model), shard, expert_shard)


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def computed(engine: Engine) -> list[Tensor]:
    """Logits of two prompts, of a part of one with a step of the other, of one token, and of none."""
    one, two = prompt(1, 37), prompt(2, 21)
    batches = [
        [BatchEntry(one[:30], 0, [3, 1, 9], "all"), BatchEntry(two[:5], 0, [7, 2], "none")],
        [BatchEntry(two[5:], 5, [7, 2]), BatchEntry([one[30]], 30, [3, 1, 9])],
        [BatchEntry([one[31]], 31, [3, 1, 9])],
        [],
    ]
    return [engine.forward(entries).clone() for entries in batches]


def greedy(engine: Engine, count: int = 12) -> list[int]:
    tokens, table = prompt(3, 9), [4, 5, 6]
    logits = engine.forward([BatchEntry(tokens, 0, table)])
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(int(logits[0].argmax()))
        logits = engine.forward([BatchEntry(tokens[-1:], len(tokens) - 1, table)])
    return tokens[start:]


def check_same(world: Group, files: Sequence[tuple[Case, str]]) -> list[int]:
    """-> bytes of each case's experts on this rank."""
    sizes = []
    groups = {ep_size: ExpertGroups.of(world, ep_size) for ep_size in sorted({case.ep_size for case, _ in files})}
    for case, path in files:
        expected = load_file(path)
        shard = Shard(world.rank, world.size) if case.tp_size > 1 else None
        own = groups[case.ep_size]
        plan = plan_of(case, shard, own.shard)
        engine = Engine(plan, group=world if shard else None, expert_groups=own)
        engine.warm_up()
        for number, logits in enumerate(computed(engine)):
            assert torch.equal(logits, expected[f"{number}"]), (case.name, number)
        assert greedy(engine) == expected["greedy"].tolist(), case.name
        layers = engine._decoder._weights.layers
        sizes.append(sum(part.num_bytes for layer in layers for part in (layer.experts_up, layer.experts_down) if part))
        engine.close()
    return sizes


def check_two(world: Group, files: Sequence[tuple[Case, str]], model: str) -> list[int]:
    with pytest.raises(ValueError, match="Invalid ep_size=3 for world_size=2: use a divisor"):
        ExpertGroups.of(world, 3)
    part = world.part([0, 1])
    assert (part.rank, part.size) == (world.rank, 2)
    assert part.process_group is not world.process_group
    assert part.gather(torch.full((3, 1), world.rank), [1, 1]).tolist() == [[0, 1]] * 3
    plan = plan_of(Case(model), None, ExpertShard.of(1 - world.rank, 2, 2))
    with pytest.raises(ValueError, match=r"^the experts are those of .*, and this process is "):
        Engine(plan, expert_groups=ExpertGroups(world, None))
    with pytest.raises(ValueError, match=r"^expert_groups: the plan has no expert_shard"):
        Engine(plan_of(Case(model)), expert_groups=ExpertGroups(world, None))
    return check_same(world, files)


def check_init_inference(world: Group, model: str, expected: dict[str, Tensor]) -> list[Tensor]:
    """The ways in which options say where experts lie -> what was drawn in each."""
    ep, mp = ExpertGroups.of(world, 2), ExpertGroups.of(world, 1)
    assert ep.ep
    assert mp.mp
    ways: tuple[dict[str, Any], ...] = (
        {"moe": {"ep_size": 2}},
        {"moe": {"ep_size": 2}, "tp": {"tp_size": 2}},
        {"moe": {"ep_group": ep.ep.process_group, "ep_size": 2}},
        {"moe": {"ep_mp_group": mp.mp.process_group}},
        {"tp": {"tp_size": 2}},
    )
    drawn = []
    for options in ways:
        torch.manual_seed(world.rank)
        engine = injected(model, **options)
        assert torch.equal(engine(TOKENS).logits, expected["logits"]), options
        assert torch.equal(engine.generate(TOKENS, max_new_tokens=8, do_sample=False), expected["tokens"])
        drawn.append(engine.generate(TOKENS, max_new_tokens=8, do_sample=True, top_k=50))
        engine.destroy()
    for moe, message in (
        ({"ep_size": 3}, r"^Invalid ep_size=3 for world_size=2: use a divisor"),
        ({"ep_size": 3, "ep_group": ep.ep.process_group}, r"^moe\.ep_size: 3, and the groups have 2"),
        ({"ep_size": 2, "ep_mp_group": ep.ep.process_group}, r"^moe\.ep_size: 2, and the groups have 1"),
        ({"ep_group": object()}, r"^moe\.ep_group: wants a torch.distributed process group, has object"),
    ):
        with pytest.raises(ValueError, match=message):
            injected(model, moe=moe)
    return drawn


def injected(model: str, **options: Any) -> InferenceEngine:
    return init_inference(model, kernel_inject=True, dtype="float32", max_out_tokens=64, **options)
