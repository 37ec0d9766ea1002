"""Models split over ranks as they are: the same answers as whole, on every rank to the bit, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from shared.config.parallel import TensorParallelConfig
from shared.engine import init_inference
from shared.engine.linear_roles import roles_of
from shared.engine.ranks import group_of
from shared.parallel.group import Group
from shared.policies.policy import UnsupportedModelError
from tests.ranks import on_ranks
from tests.split_models import GRAIN, Plain, PlainBlock, answer, bits, num_parameters, tokens, whole
from tests.tiny_models import tiny_model

Kinds = list[tuple[str, dict[str, Any]]]  # and fields of its config that are other
TWO: Kinds = [
    *((kind, {}) for kind in ("llama", "phi3", "opt", "bloom", "mpt", "falcon-new", "bert", "t5", "plain")),
    ("qwen2", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),  # two kv heads, and one
]
THREE: Kinds = [
    *((kind, {}) for kind in ("bloom", "falcon-alibi", "falcon")),  # falcon: one kv head for all ranks
    ("gpt_neox", {"num_attention_heads": 8}),
]
MORE: dict[int, Kinds] = {
    2: [
        *((kind, {}) for kind in ("mistral", "qwen2", "qwen3", "phi", "gemma2", "granite", "mixtral", "qwen2_moe")),
        *((kind, {}) for kind in ("gpt_neox", "gpt_neo", "gptj", "falcon", "falcon-alibi", "stablelm")),
        ("phi3", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}),
    ],
    3: [
        *((kind, {}) for kind in ("opt", "t5", "bert")),
        ("mpt", {"num_attention_heads": 8}),
        ("plain", {"num_heads": 4}),
        ("llama", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 88}),
    ],
}
GENERATES = ("llama", "falcon", "bloom", "mpt", "phi3")


def check_kinds(group: Group, kinds: Kinds) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, fields in kinds:
        model, reference = whole(kind, **fields), whole(kind, **fields)
        engine = init_inference(model, dtype="float32", tp={"tp_size": group.size, "tp_grain_size": GRAIN})
        ours, theirs = answer(kind, engine), answer(kind, reference)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4, msg=lambda text, kind=kind: f"{kind}: {text}")
        generated = [bits(tokens(one)) for one in (engine, reference)] if kind in GENERATES else []
        found.append(
            {
                "answer": bits(ours),
                "tokens": generated,
                "of": num_parameters(reference),
                "own": num_parameters(engine.module),
            }
        )
    return found


@functools.cache
def of_ranks(size: int) -> list[list[dict[str, Any]]]:
    return on_ranks(check_kinds, size, TWO if size == 2 else THREE)


@pytest.mark.parametrize(
    ("size", "index"), [(2, index) for index in range(len(TWO))] + [(3, index) for index in range(len(THREE))]
)
def test_split_it_answers_as_whole_on_every_rank(size: int, index: int) -> None:
    check_alike([rank[index] for rank in of_ranks(size)])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_split_more_families_answer_as_whole(size: int) -> None:
    for found in zip(*on_ranks(check_kinds, size, MORE[size], timeout_s=600), strict=True):
        check_alike(found)


def check_alike(found: Sequence[dict[str, Any]]) -> None:
    """Of one model, on each rank."""
    assert len({rank["answer"] for rank in found}) == 1
    assert len({tokens for rank in found for tokens in rank["tokens"]}) <= 1
    # embeddings stay whole, and so do experts that are no linears
    assert all(rank["own"] < 0.95 * rank["of"] for rank in found)


@pytest.mark.parametrize(
    "family", ["deberta", "deberta-v2", "flaubert", "fsmt", "gpt2", "led", "longformer", "xlm", "xlnet"]
)
def test_families_that_autotp_rejects_are_named(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"model_type: AutoTP rejects '{family}'; set kernel_inject, or"):
        roles_of(nn.Module(), None, family)


def test_what_has_no_linears_in_layers_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.ModuleList([nn.Linear(4, 4)])):
        with pytest.raises(UnsupportedModelError, match=r"AutoTP not supported for .*: it finds no linears in an nn"):
            roles_of(model, None, "")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.attn\.c_attn is a Conv1D, whose weight is transposed; set"):
        roles_of(gpt2, {type(gpt2.transformer.h[0]): ("c_proj",)}, "gpt2")


def test_the_search_reads_names_and_norms() -> None:
    rows = [name for name, role in roles_of(whole("qwen2_moe"), None, "qwen2_moe").items() if role == "row"]
    assert [name.partition("layers.0.")[2] for name in rows if "layers.0." in name] == [
        "self_attn.o_proj",
        "mlp.shared_expert.down_proj",
    ]
    whole_there = {name.rpartition(".")[2] for name, _ in whole("qwen2_moe").named_modules() if "layers.0." in name}
    assert "shared_expert_gate" in whole_there
    assert not any("gate" in name.split(".") or "shared_expert_gate" in name for name in rows)
    roles = roles_of(Plain(), None, "")
    assert [name for name, role in roles.items() if role == "row"] == [
        "blocks.0.mix",
        "blocks.0.narrow",
        "blocks.1.mix",
        "blocks.1.narrow",
    ]


def test_what_chooses_experts_stays_whole() -> None:
    layer = nn.Module()
    layer.gate = nn.Linear(8, 4)
    layer.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 16), "w2": nn.Linear(16, 8)}) for _ in range(2))
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    roles = {"experts.0.w1": "column", "experts.0.w2": "row", "experts.1.w1": "column", "experts.1.w2": "row"}
    assert roles_of(model, None, "") == {f"layers.0.{name}": role for name, role in roles.items()}
    del layer.experts
    layer.down_proj = nn.Linear(4, 8)
    assert roles_of(model, None, "") == {"layers.0.gate": "column", "layers.0.down_proj": "row"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set; start the ranks with torchrun, or set them"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT: not set"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "WORLD_SIZE: 'two' is no"),
    ],
)
def test_ranks_that_the_environment_does_not_say(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_inference(whole("plain"), dtype="float32", tp={"tp_size": 2})
    assert not dist.is_initialized()


class Units:
    """What Megatron's `mpu` has, over two of the ranks."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = process_group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_model_parallel_world_size(self) -> int:
        return self._group.size()

    def get_model_parallel_rank(self) -> int:
        return self._group.rank()

    get_data_parallel_group = get_data_parallel_world_size = get_data_parallel_rank = get_model_parallel_rank


def check_groups(group: Group, folder: Path, saved: Path) -> dict[str, Any]:
    """Of three ranks, two of which compute."""
    found: dict[str, Any] = {}
    pair = dist.new_group([1, 2])
    expected = answer("llama", whole("llama"))

    def logits(**options: Any) -> torch.Tensor:
        engine = init_inference(whole("llama"), dtype="float32", **options)
        assert num_parameters(engine.module) < num_parameters(whole("llama"))
        return answer("llama", engine)

    if group.rank:
        assert isinstance(pair, dist.ProcessGroup)
        for name, options in (
            ("tp_group", {"tp": {"tp_group": pair}}),
            ("and its size", {"tp": {"tp_group": pair, "tp_size": 2}}),
            ("mpu", {"tp": {"mpu": Units(pair)}}),
        ):
            torch.testing.assert_close(logits(**options), expected, atol=2e-4, rtol=2e-4)
            found[name] = "works"
        torch.manual_seed(group.rank)
        engine = init_inference(whole("llama"), dtype="float32", tp={"tp_group": pair})
        found["sampled"] = [tokens(engine, do_sample=True, max_new_tokens=12).tolist() for _ in range(2)]
        torch.manual_seed(1)
        again = init_inference(whole("llama"), dtype="float32")
        found["alone"] = [tokens(again, do_sample=True, max_new_tokens=12).tolist() for _ in range(2)]
        with pytest.raises(
            ValueError, match="tp_group: the process group exchanges tensors on cpu, and the model is com"
        ):
            group_of(TensorParallelConfig(tp_group=pair), "cuda")
    else:
        with pytest.raises(ValueError, match=r"tp_group: wants a torch\.distributed process group, has int"):
            logits(tp={"tp_group": pair})  # whose rank this is not
    # the first two of the default group
    try:
        torch.testing.assert_close(logits(tp={"tp_size": 2}), expected, atol=2e-4, rtol=2e-4)
    except ValueError as error:
        found["first two"] = str(error)
    for name, size in (("too many", 4), ("heads", 3)):
        with pytest.raises(ValueError, match=str(size)) as error:
            init_inference(whole("llama"), dtype="float32", tp={"tp_size": size})
        found[name] = str(error.value)

    # the search's guess is held against the model's own answers
    for kind in ("stablelm-parallel", "olmo2"):
        with pytest.raises(UnsupportedModelError) as unsupported:
            init_inference(whole(kind, num_key_value_heads=4), dtype="float32", tp={"tp_size": 3})
        found[kind] = str(unsupported.value)

    # what a policy names
    policy = {PlainBlock: ("mix", "narrow")}
    options = {"dtype": "float32", "tp": {"tp_size": 3, "tp_grain_size": GRAIN}}
    engine = init_inference(whole("plain"), injection_policy=policy, **options)
    torch.testing.assert_close(answer("plain", engine), answer("plain", whole("plain")), atol=2e-4, rtol=2e-4)
    found["policy"] = sorted(
        name for name, module in engine.module.named_modules() if type(module).__name__ == "RowLinear"
    )

    # a model on the meta device: each rank reads its part
    with torch.device("meta"):
        empty = type(whole("bloom"))(whole("bloom").config)
    engine = init_inference(empty, checkpoint=str(folder), save_mp_checkpoint_path=str(saved), **options)
    assert num_parameters(engine.module) < 0.7 * num_parameters(whole("bloom"))
    found["meta"] = bits(answer("bloom", engine))
    in_memory = init_inference(whole("bloom"), checkpoint=str(folder), **options)
    found["in memory"] = bits(answer("bloom", in_memory))
    half = init_inference(whole("bloom"), **{**options, "dtype": "bf16"})
    table, head = half.module.transformer.word_embeddings.weight, half.module.lm_head.weight
    found["bf16"] = {
        "answer": bits(answer("bloom", half)),
        "dtypes": {str(parameter.dtype) for parameter in half.module.parameters()},
        "head is the table's": head.untyped_storage().data_ptr() == table.untyped_storage().data_ptr(),
        "apart": float((answer("bloom", half) - answer("bloom", in_memory)).abs().max()),
    }
    found["read again"] = bits(answer("bloom", init_inference(empty, checkpoint=str(saved), **options)))
    return found


@pytest.fixture(scope="module")
def of_groups(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(check_groups, 3, tiny_model("bloom"), tmp_path_factory.mktemp("saved"))


def test_a_group_is_given_in_three_ways(of_groups: list[dict[str, Any]]) -> None:
    for rank in of_groups[1:]:
        assert rank["tp_group"] == rank["and its size"] == rank["mpu"] == "works"
    assert "first two" not in of_groups[0]
    assert "first two" not in of_groups[1]
    assert of_groups[2]["first two"].startswith("tensor_parallel.tp_size: 2, and this is rank 2 of 3")


def test_ranks_draw_the_same_tokens_from_there_on(of_groups: list[dict[str, Any]]) -> None:
    """Those that rank 0 of the group would draw alone."""
    one, two = of_groups[1], of_groups[2]
    assert one["sampled"] == two["sampled"] == one["alone"]
    assert one["sampled"][0] != one["sampled"][1]


def test_what_the_ranks_do_not_fit_is_said(of_groups: list[dict[str, Any]]) -> None:
    for rank in of_groups:
        assert rank["too many"].startswith("tensor_parallel.tp_size: 4, and torch.distributed has 3 ranks; start as")
        assert "2 key-value heads cannot be cut for 3 ranks" in rank["heads"]


def test_a_model_that_answers_otherwise_when_split_is_refused(of_groups: list[dict[str, Any]]) -> None:
    for rank in of_groups:
        assert "StableLmForCausalLM, split, answers otherwise than whole" in rank["stablelm-parallel"]
        assert "Olmo2ForCausalLM: split, it cannot compute" in rank["olmo2"]


def test_a_policy_names_the_linears_whose_inputs_are_cut(of_groups: list[dict[str, Any]]) -> None:
    for rank in of_groups:
        assert rank["policy"] == ["blocks.0.mix", "blocks.0.narrow", "blocks.1.mix", "blocks.1.narrow"]


def test_in_bfloat16_the_output_layer_is_still_a_part_of_the_embedding(of_groups: list[dict[str, Any]]) -> None:
    assert len({rank["bf16"]["answer"] for rank in of_groups}) == 1
    for rank in of_groups:
        assert rank["bf16"]["dtypes"] == {"torch.bfloat16"}
        assert rank["bf16"]["head is the table's"]
        assert 0 < rank["bf16"]["apart"] < 0.5


def test_a_rank_reads_its_part_of_a_checkpoint(of_groups: list[dict[str, Any]]) -> None:
    assert len({rank[way] for rank in of_groups for way in ("meta", "in memory", "read again")}) == 1
