"""Injected models on several ranks: the bits of one process, however they are loaded and called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from shared.checkpoint import HUGGING_FACE, Sizes, save_mp_checkpoint
from shared.engine import InferenceEngine, init_inference
from shared.parallel.group import Group
from tests.injected import mask_of, prompts
from tests.ranks import on_ranks
from tests.tiny_encoders import random_encoder
from tests.tiny_models import tiny_model

GRAIN = 8
WAYS = ("memory", "folder", "meta", "saved for one", "saved for four", "int8", "int8 again")  # to come by a model


def engine_of(way: str, places: dict[str, Path], **options: Any) -> InferenceEngine:
    """The tiny llama, loaded so."""
    options = {"kernel_inject": True, "dtype": "float32", "max_out_tokens": 96, **options}
    if way == "folder":
        return init_inference(str(places["llama"]), **options)
    if way == "memory":
        return init_inference(in_memory(places["llama"]), **options)
    if way == "int8":
        return init_inference(in_memory(places["llama"]), **{**options, "dtype": "int8"})
    if way == "int8 again":
        return init_inference(on_meta(places["llama"]), **{**options, "dtype": "int8"}, checkpoint=str(places[way]))
    return init_inference(on_meta(places["llama"]), checkpoint=str(places.get(way, places["llama"])), **options)


def in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def on_meta(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def answers(engine: InferenceEngine) -> list[Tensor]:
    """Of padded batches, of a call that goes on with a cache, and of generating."""
    ids = prompts()
    found: list[Tensor] = []
    for side in ("none", "left", "right"):
        out = engine(ids, attention_mask=mask_of(side))
        found.append(out.logits)
    step = engine(ids[:, :1], past_key_values=engine(ids).past_key_values)
    found.append(step.logits)
    mask = mask_of("left")
    found.append(engine.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    torch.manual_seed(5)
    found += [engine.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, top_k=50) for _ in range(2)]
    # more rows than the first pool has blocks for
    found.append(engine(prompts(24, 40)).logits)
    return found


def encoded(**options: Any) -> Tensor:
    engine = init_inference(random_encoder("bert"), kernel_inject=True, dtype="float32", **options)
    return engine(prompts(), attention_mask=mask_of("right")).last_hidden_state


def check(group: Group, places: dict[str, Path], saved: Path) -> dict[str, Any]:
    options = {"tp": {"tp_size": group.size, "tp_grain_size": GRAIN}}
    found: dict[str, Any] = {way: answers(engine_of(way, places, **options)) for way in WAYS}
    engine_of("memory", places, save_mp_checkpoint_path=str(saved), **options).destroy()
    found["bert"] = encoded(**options)
    # a sampled generate of ranks that have drawn before
    torch.manual_seed(group.rank)
    engine = engine_of("folder", places, **options)
    found["drawn"] = engine.generate(prompts(), max_new_tokens=8, do_sample=True)
    with pytest.raises(RuntimeError, match=r"Workspace can't be allocated, not enough memory: 10{12} tokens"):
        engine_of("folder", places, max_out_tokens=10**12, min_out_tokens=10**12, **options)
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model's folder, and what one process saved of it, for one rank or three."""
    folder = tmp_path_factory.mktemp("saved")
    found = {"llama": tiny_model("llama")}
    for way, dtype in (("saved for one", "float32"), ("int8 again", "int8")):
        found[way] = folder / way
        engine_of("memory", found, dtype=dtype, save_mp_checkpoint_path=str(found[way])).destroy()
    model = in_memory(found["llama"])
    table = HUGGING_FACE.sized(Sizes.of_config(model.config.to_dict()))
    found["saved for four"] = save_mp_checkpoint(folder / "four", model.state_dict(), table, 4)
    return found


@pytest.fixture(scope="module")
def by_rank(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    saved = tmp_path_factory.mktemp("shards")
    return on_ranks(check, 2, places, saved), saved


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_have_the_bits_of_one_process(way: str, places: dict[str, Path], by_rank: Any) -> None:
    expected = answers(engine_of(way, places))
    for rank in by_rank[0]:
        assert len(rank[way]) == len(expected)
        assert all(torch.equal(ours, alone) for ours, alone in zip(rank[way], expected, strict=True))


def test_an_encoder_on_two_ranks_has_the_bits_of_one(by_rank: Any) -> None:
    assert all(torch.equal(rank["bert"], encoded()) for rank in by_rank[0])


def test_ranks_draw_the_same_tokens(by_rank: Any) -> None:
    assert torch.equal(by_rank[0][0]["drawn"], by_rank[0][1]["drawn"])


def test_what_ranks_save_is_read_at_another_degree(places: dict[str, Path], by_rank: Any) -> None:
    saved = by_rank[1]
    assert sorted(path.name for path in saved.iterdir()) == [
        "ds_inference_config.json",
        "non-tp.safetensors",
        "tp_00_of_02.safetensors",
        "tp_01_of_02.safetensors",
    ]
    ours, expected = (engine_of(way, {**places, "saved": saved}) for way in ("saved", "memory"))
    assert torch.equal(ours(prompts()).logits, expected(prompts()).logits)
