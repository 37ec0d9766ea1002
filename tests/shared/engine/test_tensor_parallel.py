"""A model on several ranks against the same model in one process: the same bits of every logit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.engine import Engine
from shared.parallel.sharding import Shard
from shared.parallel.start import end_group, start_group
from tests.rank_engines import (
    Case,
    check_few,
    check_same,
    check_three,
    check_two,
    encoder_states,
    few,
    in_one_process,
    plan_of,
)
from tests.ranks import on_ranks
from tests.tiny_encoders import tiny_encoder
from tests.tiny_models import KINDS, smollm2, tiny_gguf, tiny_model

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


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """An engine sets how many torch has."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_two_ranks_have_the_bits_of_one(tmp_path: Path):
    """And those that add partial sums have its tokens."""
    llama = str(tiny_model("llama"))
    same = [Case(str(tiny_model(kind))) for kind in TWO_RANKS]
    same += [Case(llama, quantization=mode) for mode in ("int8", "int8_dynamic", "int4", "fp8")]
    same += [Case(llama, dtype="bfloat16"), Case(str(tiny_gguf()), quantization="int8")]
    kinds = ("llama-untied-biased", "gpt2", "qwen2_moe")
    sums = [Case(str(tiny_model(kind)), deterministic=False) for kind in kinds]
    sums.append(Case(llama, quantization="int8", deterministic=False))
    folders = [str(tiny_encoder(kind)) for kind in ("bert", "roberta")]
    encoders = [(folder, encoder_states(folder).numpy().tobytes()) for folder in folders]
    files = in_one_process(same, tmp_path / "same"), in_one_process(sums, tmp_path / "sums")
    on_ranks(check_two, 2, *files, encoders)


def test_three_ranks_have_the_bits_of_one(tmp_path: Path):
    """Until one of them dies, which the others are told."""
    same = [Case(str(tiny_model(kind))) for kind in THREE_RANKS]
    same.append(Case(str(tiny_model("gpt2")), quantization="int4"))
    same.append(Case(str(tiny_model("falcon")), dtype="float16"))
    sums = [Case(str(tiny_model("gpt2")), deterministic=False)]
    files = in_one_process(same, tmp_path / "same"), in_one_process(sums, tmp_path / "sums")
    first, second, last = on_ranks(check_three, 3, *files, dying=[2])
    assert last is None
    assert "a rank is gone" in first
    assert "a rank is gone" in second


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_rank_goes_the_way_of_several(device: str, tmp_path: Path):
    """Over gloo, or NCCL."""
    cases = [Case(str(tiny_model(kind)), device=device) for kind in ("llama", "olmo2", "gpt2")]
    if device == "cpu":  # elsewhere such linears are cuBLAS's
        cases.append(Case(str(tiny_model("gpt2")), "bfloat16", deterministic=False))
    files = in_one_process(cases, tmp_path)
    group = start_group(rank=0, size=1, rendezvous=f"file://{tmp_path}/ranks", device=device)
    try:
        check_same(group, files)
    finally:
        end_group()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_heads_that_do_not_fit_are_refused(kind: str):
    with pytest.raises(ValueError, match=r"^2 key-value heads cannot be cut for 3 ranks"):
        plan_of(Case(str(tiny_model(kind))), Shard(0, 3))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_has_the_bits_of_one_process(size: int, tmp_path: Path):
    """With four ranks each key-value head of most of them lies on two."""
    dtypes = ("float32", "bfloat16")
    cases = [Case(str(tiny_model(kind)), dtype=dtype) for kind in KINDS for dtype in dtypes]
    on_ranks(check_same, size, in_one_process(cases, tmp_path), timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_default_model_has_the_bits_of_one_process(size: int, tmp_path: Path):
    """Its 9 query heads on 3 key-value heads: 6 and 3, or 3 each; and its file's own integers."""
    folder = str(smollm2().folder)
    cases = [Case(folder, "bfloat16", mode) for mode in ("none", "int4")]
    on_ranks(check_same, size, in_one_process(cases, tmp_path), timeout_s=280)


@pytest.mark.slow
def test_triton_gives_ranks_the_bits_of_one_process(interpreter: None, tmp_path: Path):
    """The processes of the ranks compute in Triton's interpreter, too."""
    case, path = Case(str(tiny_model("llama")), "bfloat16", "int4"), str(tmp_path / "few.safetensors")
    save_file({"few": few(Engine(plan_of(case)))}, path)
    on_ranks(check_few, 2, [(case, path)], timeout_s=250)
