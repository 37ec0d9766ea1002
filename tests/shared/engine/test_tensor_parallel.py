"""A model on several ranks against the same model in one process: the same bits of every logit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.batch import BatchEntry
from shared.config import load_config
from shared.engine import Engine, EnginePlan
from shared.model_store import ModelStore
from shared.parallel.group import Group
from shared.parallel.sharding import Shard
from tests.ranks import on_ranks
from tests.tiny_models import KINDS, tiny_gguf, tiny_model

BLOCK_TOKENS = 16
# One of each that is cut, or put together, in a way of its own; as many key-value heads as queries, or one, with three.
TWO_RANKS = (
    "llama",
    "llama-untied-biased",
    "qwen2_moe",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt-post-norm",
    "bloom",
    "falcon-new",
    "stablelm-parallel",
    "olmo2",
)
THREE_RANKS = ("gpt2", "bloom", "gpt_neox", "opt-post-norm", "falcon", "mpt")


@dataclass(frozen=True)
class Case:
    """A model, and how it is loaded."""

    model: str
    dtype: str = "float32"
    quantization: str = "none"
    deterministic: bool = True

    @property
    def name(self) -> str:
        return f"{Path(self.model).name} {self.dtype} {self.quantization}"


def plan_of(case: Case, shard: Shard | None = None) -> EnginePlan:
    overrides = {
        "model": case.model,
        "dtype": case.dtype,
        "quantization": case.quantization,
        "deterministic": case.deterministic,
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


def check_two(group: Group, same: Sequence[tuple[Case, str]], sums: Sequence[tuple[Case, str]]) -> None:
    check_same(group, same)
    check_sums(group, sums)
    check_refusals(group, same[0][0].model)


def test_two_ranks_have_the_bits_of_one(tmp_path: Path):
    """And those that add partial sums have its tokens."""
    llama = str(tiny_model("llama"))
    same = [Case(str(tiny_model(kind))) for kind in TWO_RANKS]
    same += [Case(llama, quantization=mode) for mode in ("int8", "int4")]
    same += [Case(llama, dtype="bfloat16"), Case(str(tiny_gguf()), quantization="int8")]
    kinds = ("llama-untied-biased", "gpt2", "qwen2_moe")
    sums = [Case(str(tiny_model(kind)), deterministic=False) for kind in kinds]
    sums.append(Case(llama, quantization="int8", deterministic=False))
    on_ranks(check_two, 2, in_one_process(same, tmp_path / "same"), in_one_process(sums, tmp_path / "sums"))


def test_three_ranks_have_the_bits_of_one(tmp_path: Path):
    same = [Case(str(tiny_model(kind))) for kind in THREE_RANKS]
    same.append(Case(str(tiny_model("gpt2")), quantization="int4"))
    same.append(Case(str(tiny_model("falcon")), dtype="float16"))
    sums = [Case(str(tiny_model("gpt2")), deterministic=False)]
    on_ranks(check_three, 3, in_one_process(same, tmp_path / "same"), in_one_process(sums, tmp_path / "sums"))


def check_three(group: Group, same: Sequence[tuple[Case, str]], sums: Sequence[tuple[Case, str]]) -> None:
    check_same(group, same)
    check_sums(group, sums)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_heads_that_do_not_fit_are_refused(kind: str):
    with pytest.raises(ValueError, match=r"^2 key-value heads cannot be cut for 3 ranks"):
        plan_of(Case(str(tiny_model(kind))), Shard(0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_has_the_bits_of_one_process(size: int, tmp_path: Path):
    """With four ranks each key-value head of most of them lies on two."""
    dtypes = ("float32", "bfloat16")
    cases = [Case(str(tiny_model(kind)), dtype=dtype) for kind in KINDS for dtype in dtypes]
    on_ranks(check_same, size, in_one_process(cases, tmp_path), timeout_s=900)
