"""What the ranks of a model do in tests. Processes that import this load no more than an engine takes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.batch import BatchEntry
from shared.checkpoint import open_any
from shared.config import load_config
from shared.engine import Engine, EnginePlan
from shared.model_files import read_json
from shared.model_store import ModelStore
from shared.models.encoder import Encoder
from shared.models.loading import load_weights
from shared.models.ranks import Ranks
from shared.parallel.group import Group, GroupError
from shared.parallel.partition import Partition
from shared.parallel.sharding import Shard
from shared.policies.table import architecture_of

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A model, and how it is loaded."""

    model: str
    dtype: str = "float32"
    quantization: str = "none"
    deterministic: bool = True
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{Path(self.model).name} {self.dtype} {self.quantization}"


def plan_of(case: Case, shard: Shard | None = None) -> EnginePlan:
    overrides = {
        "model": case.model,
        "dtype": case.dtype,
        "quantization": case.quantization,
        "deterministic": case.deterministic,
        "device": case.device,
        "threads": 1,
        "decode": {"num_blocks": 24, "max_running": 8, "block_tokens": BLOCK_TOKENS},
    }
    config = load_config(None, overrides)
    return EnginePlan.of(config, config.decode, ModelStore().resolve(config.model), shard)


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(3, 380, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def computed(engine: Engine) -> list[Tensor]:
    """Logits of prompts whole and in chunks, of steps, and of both in one batch."""
    one, two = prompt(1, 37), prompt(2, 21)
    tables = [3, 1, 9], [7, 2]
    logits = [engine.forward([BatchEntry(one[:30], 0, tables[0], "all"), BatchEntry(two[:5], 0, tables[1], "none")])]
    logits[0] = logits[0].clone()
    logits.append(engine.forward([BatchEntry(two[5:], 5, tables[1]), BatchEntry([one[30]], 30, tables[0])]).clone())
    for position in range(31, 34):
        entries = [BatchEntry([one[position]], position, tables[0]), BatchEntry([5], position - 10, tables[1])]
        logits.append(engine.forward(entries).clone())
    return logits


def greedy(engine: Engine, count: int = 12) -> list[int]:
    tokens, table = prompt(3, 9), [4, 5, 6]
    logits = engine.forward([BatchEntry(tokens, 0, table)])
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(int(logits[0].argmax()))
        logits = engine.forward([BatchEntry(tokens[-1:], len(tokens) - 1, table)])
    return tokens[start:]


def in_one_process(cases: Sequence[Case], folder: Path) -> list[tuple[Case, str]]:
    """What the ranks have to compute, in files."""
    folder.mkdir(exist_ok=True)
    files = []
    for index, case in enumerate(cases):
        engine = Engine(plan_of(case))
        path = folder / f"{index}.safetensors"
        tensors = {f"{number}": logits for number, logits in enumerate(computed(engine))}
        save_file(tensors | {"greedy": torch.tensor(greedy(engine))}, path)
        engine.close()
        files.append((case, str(path)))
    return files


def check_same(group: Group, files: Sequence[tuple[Case, str]]) -> None:
    torch.set_num_threads(1)
    for case, path in files:
        expected = load_file(path)
        plan = plan_of(case, Shard(group.rank, group.size))
        engine = Engine(plan, group=group)
        engine.warm_up()
        logits = computed(engine)
        for number, one in enumerate(logits):
            if case.deterministic:
                assert torch.equal(one, expected[f"{number}"]), (case.name, number)
            else:
                torch.testing.assert_close(one, expected[f"{number}"], rtol=1e-4, atol=1e-4, msg=case.name)
        assert greedy(engine) == expected["greedy"].tolist(), case.name
        engine.close()


def check_few(group: Group, files: Sequence[tuple[Case, str]]) -> None:
    """Of ops that are slow."""
    for case, path in files:
        engine = Engine(plan_of(case, Shard(group.rank, group.size)), group=group)
        assert torch.equal(few(engine), load_file(path)["few"]), case.name


def few(engine: Engine) -> Tensor:
    """Logits of a few tokens, and of one after them."""
    tokens, table = prompt(1, 4), [3]
    first = engine.forward([BatchEntry(tokens[:3], 0, table)]).clone()
    return torch.cat([first, engine.forward([BatchEntry(tokens[3:], 3, table)])])


def check_sums(group: Group, files: Sequence[tuple[Case, str]]) -> None:
    """Last linears cut by their inputs: partial sums are added, and the bits are those of so many ranks."""
    check_same(group, files)
    for case, _ in files:
        engine = Engine(plan_of(case, Shard(group.rank, group.size)), group=group)
        entries = [BatchEntry(prompt(seed, 5), 0, [seed]) for seed in (1, 2, 3)]
        together = engine.forward(entries).clone()
        for row, entry in enumerate(entries):
            assert torch.equal(engine.forward([entry])[0], together[row]), case.name
        engine.close()


def check_refusals(group: Group, model: str) -> None:
    plan = plan_of(Case(model), Shard(group.rank, group.size))
    other = replace(plan, shard=Shard(1 - group.rank, group.size))
    with pytest.raises(ValueError, match=f"^the shard is rank {1 - group.rank} of 2, and this process is rank"):
        Engine(other, group=group)
    with pytest.raises(ValueError, match=r"^group: a plan with a shard has one"):
        Engine(plan)
    with pytest.raises(ValueError, match=r"^group: a plan with a shard has one"):
        Engine(plan_of(Case(model)), group=group)
    engine = Engine(plan, group=group)
    # on every rank, so that none waits for another
    with pytest.raises(IndexError, match=re.escape("token_ids[1] is 384, and the table has 384 rows")):
        engine.forward([BatchEntry([5, 384], 0, [1])])
    assert engine.plan.layout.num_kv_heads == 1
    assert engine.plan.layout.first_kv_head == group.rank
    assert len(engine.forward([])) == 0
    engine.grow(40)
    assert engine.forward([BatchEntry([5, 6], 0, [39])]).isfinite().all()


def encoder_states(kind_folder: str, group: Group | None = None) -> Tensor:
    """Hidden states of texts, back to back."""
    folder = Path(kind_folder)
    architecture = architecture_of(read_json(folder / "config.json"))
    shard = None if group is None else Shard(group.rank, group.size)
    weights = load_weights(architecture, open_any(folder), dtype=torch.float32, device="cpu", shard=shard)
    ranks = group and shard and Ranks(group, Partition(architecture, shard))
    texts = [prompt(seed, count) for seed, count in ((1, 9), (2, 1), (3, 20))]
    ends = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
    tokens = torch.tensor(list(chain.from_iterable(texts)))
    return Encoder(architecture, weights, ranks=ranks).forward(tokens, ends)


def check_encoder(group: Group, folder: str, expected: bytes) -> None:
    assert encoder_states(folder, group).numpy().tobytes() == expected


def check_two(
    group: Group,
    same: Sequence[tuple[Case, str]],
    sums: Sequence[tuple[Case, str]],
    encoders: Sequence[tuple[str, bytes]],
) -> None:
    check_same(group, same)
    check_sums(group, sums)
    check_refusals(group, same[0][0].model)
    for folder, expected in encoders:
        check_encoder(group, folder, expected)


def check_three(group: Group, same: Sequence[tuple[Case, str]], sums: Sequence[tuple[Case, str]]) -> str:
    """The last rank dies in the end; what the others' next forward says."""
    check_same(group, same)
    check_sums(group, sums)
    engine = Engine(plan_of(same[0][0], Shard(group.rank, group.size)), group=group)
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(GroupError) as error:
        engine.forward([BatchEntry([5, 6], 0, [1])])
    return str(error.value)
