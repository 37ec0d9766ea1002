"""Models whose experts lie on several ranks, against Hugging Face and against one process: the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.engine import Engine
from tests.experts_on_ranks import (
    TOKENS,
    Case,
    check_init_inference,
    check_same,
    check_two,
    computed,
    greedy,
    injected,
    plan_of,
    prompt,
)
from tests.megatron_moe import MegatronMoe
from tests.ranks import on_ranks
from tests.tiny_models import tiny_model, tiny_tokenizer


def in_one_process(cases: Sequence[Case], folder: Path) -> list[tuple[Case, str]]:
    """What the ranks have to compute, in files."""
    files: dict[tuple[str, str, str], str] = {}
    for case in cases:
        kind = (case.model, case.quantization, case.dtype)
        if kind not in files:
            engine = Engine(plan_of(case))
            tensors = {f"{number}": logits for number, logits in enumerate(computed(engine))}
            files[kind] = str(folder / f"{len(files)}.safetensors")
            tensors |= {"greedy": torch.tensor(greedy(engine))}
            # of equal logits our first are the best, and torch's any
            if case.quantization == "none" and case.dtype == "float32" and Path(case.model).name != "uneven":
                check_close(case.model, tensors)
            save_file(tensors, files[kind])
            engine.close()
    return [(case, files[case.model, case.quantization, case.dtype]) for case in cases]


@torch.inference_mode()
def check_close(model: str, found: dict[str, Tensor]) -> None:
    """To the model's own code."""
    start, prompts = torch.tensor([prompt(3, 9)]), torch.tensor([prompt(1, 37)[:30]])
    config = json.loads((Path(model) / "config.json").read_text())
    if config["model_type"] == "megatron_gpt_moe":
        theirs = MegatronMoe([0, 2, 0, 4], **config)
        logits, tokens = theirs(prompts)[0].float(), theirs.greedy(start[0], 12)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        logits = theirs(prompts).logits[0]
        tokens = theirs.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    torch.testing.assert_close(found["0"], logits, atol=1e-4, rtol=1e-4)
    assert found["greedy"].tolist() == tokens[9:].tolist()


def unevenly_routed(kind: str, folder: Path) -> str:
    """A tiny model whose tokens all go to the first experts of a layer: those of one rank, and others have no pair."""
    shutil.copytree(tiny_model(kind), folder)
    tensors = load_file(folder / "model.safetensors")
    routers = [name for name in tensors if name.endswith("gate.weight")]
    assert routers
    for name in routers:
        tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def residual(folder: Path) -> str:
    """A residual pyramid: 2 experts in one layer, 4 in another, which have biases and are not gated."""
    model = MegatronMoe([0, 2, 0, 4], num_experts=[2, 4], mlp_type="residual")
    tiny_tokenizer().save_pretrained(folder, save_jinja_files=False)
    save_file({name: value.float() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config))
    return str(folder)


def test_two_ranks_have_the_bits_of_one(tmp_path: Path) -> None:
    (tmp_path / "residual").mkdir()
    mixtral, uneven = str(tiny_model("mixtral")), unevenly_routed("mixtral", tmp_path / "uneven")
    models = (mixtral, str(tiny_model("qwen2_moe")), uneven, residual(tmp_path / "residual"))
    cases = [Case(model, ep_size=2) for model in models]
    cases += [Case(model, ep_size=1) for model in models[1:]]  # each expert on both
    cases += [Case(model, tp_size=2, ep_size=ep_size) for model in models[:2] for ep_size in (1, 2)]
    cases += [Case(mixtral, quantization="int8", ep_size=ep_size) for ep_size in (1, 2)]
    cases += [Case(mixtral, dtype="bfloat16", quantization=form, ep_size=2) for form in ("none", "int4")]
    files = in_one_process(cases, tmp_path)
    own, others = on_ranks(check_two, 2, files, mixtral)
    for case, first, second in zip(cases, own, others, strict=True):
        assert first == second or Path(case.model).name != "mixtral", "an even share"
    assert sum(own) < 0.6 * (sum(own) + sum(others)), "each rank has its own alone"


def test_three_ranks_have_the_bits_of_one(tmp_path: Path) -> None:
    cases = [Case(str(tiny_model("qwen2_moe")), ep_size=3)]
    cases.append(Case(unevenly_routed("qwen2_moe", tmp_path / "uneven"), ep_size=3))
    on_ranks(check_same, 3, in_one_process(cases, tmp_path))


def test_init_inference_puts_experts_on_ranks() -> None:
    """By ep_size or groups, with and without tensor parallelism: the same tokens, drawn ones too."""
    model = str(tiny_model("qwen2_moe"))
    engine = injected(model)
    tokens = engine.generate(TOKENS, max_new_tokens=8, do_sample=False)
    expected = {"logits": engine(TOKENS).logits, "tokens": tokens}
    engine.destroy()
    one, other = on_ranks(check_init_inference, 2, model, expected)
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_one_process_has_no_others_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"^Invalid ep_size=2 for world_size=1: use a divisor"):
        injected(str(tiny_model("mixtral")), moe={"ep_size": 2})
    with pytest.raises(ValueError, match=r"^moe\.ep_size: 2, and the model has no experts; leave it out"):
        injected(str(tiny_model("llama")), moe={"ep_size": 2})


@pytest.mark.slow
def test_four_ranks_of_two_groups_each_way(tmp_path: Path) -> None:
    """ep 2 by mp 2, with the dense parts whole; and ep 4."""
    (tmp_path / "residual").mkdir()
    models = (str(tiny_model("mixtral")), str(tiny_model("qwen2_moe")), residual(tmp_path / "residual"))
    cases = [Case(model, ep_size=2) for model in models]
    cases += [Case(models[0], ep_size=4), Case(models[0], quantization="int8", ep_size=2)]
    cases += [Case(models[0], tp_size=4, ep_size=ep_size) for ep_size in (1, 2, 4)]
    on_ranks(check_same, 4, in_one_process(cases, tmp_path), timeout_s=300)
