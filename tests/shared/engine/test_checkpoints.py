"""Checkpoints of every form through init_inference: the model that they are loaded into answers as the one that was
loaded normally."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels.quantization import Quantization
from shared.checkpoint import CheckpointError, open_any, save_flat, save_mp_checkpoint
from shared.checkpoint.cut_tables import table_for
from shared.checkpoint.cuts import Sizes
from shared.checkpoint.recast import RecastCheckpoint
from shared.engine import init_inference
from shared.model_files import ModelError
from shared.policies.table import POLICIES
from tests.shared.checkpoint import megatron_files
from tests.shared.checkpoint.megatron_files import mixed, nested
from tests.shared.checkpoint.test_mp_checkpoint import write_as_deepspeed
from tests.tiny_models import KINDS, tiny_model

TOKENS = torch.tensor([[5, 9, 300, 77, 12, 8, 260]])
# one kind of each family
ONE_EACH = {fields["model_type"]: kind for kind, fields in reversed(KINDS.items())}


def on_meta(kind: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(tiny_model(kind))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weights_of(kind: str) -> dict[str, Tensor]:
    return load_file(tiny_model(kind) / "model.safetensors")


def logits(model: Any, **options: Any) -> Tensor:
    engine = init_inference(model, **{"dtype": "float32", "kernel_inject": True, "max_tokens": 32, **options})
    try:
        return engine(TOKENS).logits
    finally:
        engine.destroy()


@functools.cache
def expected(kind: str = "llama", dtype: str = "float32") -> Tensor:
    """Of the model in memory, as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32)
    return logits(model, dtype=dtype)


@pytest.mark.parametrize("kind", ONE_EACH.values())
def test_every_family_loads_onto_the_meta_device(kind: str) -> None:
    assert torch.equal(logits(on_meta(kind), checkpoint=str(tiny_model(kind))), expected(kind))


def test_a_folder_is_a_model_with_its_weights() -> None:
    assert torch.equal(logits(tiny_model("llama")), expected())


@torch.inference_mode()
def test_fields_of_its_config_are_overridden_alike() -> None:
    given = [tiny_model("llama"), AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)]
    injected, of_folder = (logits(model, args={"rms_norm_eps": 0.01}) for model in reversed(given))
    assert torch.equal(of_folder, injected)
    assert not torch.equal(injected, expected())
    as_it_is = logits(given[0], kernel_inject=False, args={"rms_norm_eps": 0.01})
    torch.testing.assert_close(injected, as_it_is, rtol=1e-4, atol=1e-4)


def training_folder(folder: Path) -> Path:
    """Two tags, of which `latest` names the one with the model; the other has zeros."""
    state = weights_of("llama")
    for tag, values in (("step1", {name: value * 0 for name, value in state.items()}), ("step2", state)):
        (folder / tag).mkdir(parents=True)
        torch.save({"module": values, "mp_world_size": 1}, folder / tag / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("step2")
    return folder


def test_a_training_folder_and_its_tags(tmp_path: Path) -> None:
    folder = str(training_folder(tmp_path))
    trusting = {"allow_pickle": True}
    assert torch.equal(logits(on_meta("llama"), checkpoint=folder, checkpoint_config=trusting), expected())
    same = {**trusting, "checkpoint_dir": folder, "tag": "step2"}
    assert torch.equal(logits(on_meta("llama"), checkpoint_config=same), expected())
    other = logits(on_meta("llama"), checkpoint=folder, checkpoint_config={**trusting, "tag": "step1"})
    assert not torch.equal(other, expected())
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt is pickle.*checkpoint_config.allow_pickle"):
        logits(on_meta("llama"), checkpoint=folder)


def in_two_files(folder: Path) -> list[str]:
    state = weights_of("llama")
    names = sorted(state)
    for index in range(2):
        save_file({name: state[name] for name in names[index::2]}, folder / f"part{index}.safetensors")
    return ["part0.safetensors", "part1.safetensors"]


def test_a_description_as_json_and_as_a_dictionary(tmp_path: Path) -> None:
    description = {"type": "ds_model", "checkpoints": in_two_files(tmp_path), "version": 1.0}
    (tmp_path / "description.json").write_text(json.dumps(description))
    assert torch.equal(logits(on_meta("llama"), checkpoint=str(tmp_path / "description.json")), expected())
    assert torch.equal(logits(on_meta("llama"), checkpoint=description, base_dir=str(tmp_path)), expected())


@pytest.mark.parametrize("wrapping", [None, "module", "model"])
def test_a_file_of_a_state_dict(tmp_path: Path, wrapping: str | None) -> None:
    state = weights_of("llama")
    torch.save(state if wrapping is None else {wrapping: state}, tmp_path / "model.pt")
    options = {"checkpoint": str(tmp_path / "model.pt")}
    trusting = {"allow_pickle": True}
    assert torch.equal(logits(on_meta("llama"), **options, checkpoint_config=trusting), expected())
    with pytest.raises(CheckpointError, match=r"model.pt is pickle.*checkpoint_config.allow_pickle"):
        logits(on_meta("llama"), **options)


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_gpt2_as_megatron_writes_it(tmp_path: Path, version: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks' files, fused rows in the version's order, a vocabulary that is padded."""
    monkeypatch.setattr(megatron_files, "VOCAB", 384)
    monkeypatch.setattr(megatron_files, "HIDDEN", 64)
    monkeypatch.setattr(megatron_files, "HEAD_DIM", 16)
    state = weights_of("gpt2")
    renamed = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "attention.dense"}
    renamed |= {"mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
    tops = {"wte": "word_embeddings", "wpe": "position_embeddings", "ln_f": "transformer.final_layernorm"}
    for rank in range(2):
        shard: dict[str, Tensor] = {}
        for name, value in state.items():
            found = re.fullmatch(r"transformer\.(?:h\.(\d+)\.)?(.*)\.(weight|bias)", name)
            assert found
            layer, module, part = found.groups()
            value = value.T if module.rsplit(".", maxsplit=1)[-1].startswith("c_") and value.dim() == 2 else value
            if module == "attn.c_attn":
                parts = tuple(one.unflatten(0, (4, 16)) for one in value.chunk(3))
                fused = f"transformer.layers.{layer}.attention.query_key_value.{part}"
                shard[fused] = mixed(parts, megatron_files.heads_of(rank, 2), version)  # pyright: ignore[reportArgumentType]
                continue
            flat = f"{tops[module]}.{part}" if layer is None else f"transformer.layers.{layer}.{renamed[module]}.{part}"
            shard[flat] = megatron_files.cut(flat, value, rank, 2)
        entries = {"module": nested(shard, new=version >= 2), "mp_world_size": 2, "checkpoint_version": version}
        torch.save(entries, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    found = logits(on_meta("gpt2"), checkpoint=str(tmp_path), checkpoint_config={"allow_pickle": True})
    assert torch.equal(found, expected("gpt2"))


# module -> DeepSpeed's, with w or b for the weight or the bias
REPLACED = {
    "ln_1": "norm_{}",
    "input_layernorm": "norm_{}",
    "ln_2": "mlp.attn_n{}",
    "post_attention_layernorm": "mlp.attn_n{}",
    "attn.c_attn": "attention.attn_qkv{}",
    "self_attention.query_key_value": "attention.attn_qkv{}",
    "attn.c_proj": "attention.attn_o{}",
    "self_attention.dense": "attention.attn_o{}",
    "mlp.c_fc": "mlp.inter_{}",
    "mlp.dense_h_to_4h": "mlp.inter_{}",
    "mlp.c_proj": "mlp.output_{}",
    "mlp.dense_4h_to_h": "mlp.output_{}",
}


def as_injected(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Layers of a GPT-2 or BLOOM by DeepSpeed's names, linears [out, in]; and what lies on every rank."""
    layers, rest = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in weights_of(kind).items():
        found = re.fullmatch(r"(.*\.h\.\d+\.)(.*)\.(weight|bias)", name)
        if found is None:
            rest[name] = value
            continue
        layer, module, part = found.groups()
        if ".c_" in module and value.dim() == 2:
            value = value.T
        if module.endswith("query_key_value"):  # head by head, of BLOOM
            value = value.unflatten(0, (-1, 3, 16)).transpose(0, 1).flatten(0, 2)
        layers[layer + REPLACED[module].format(part[0])] = value.contiguous()
    return layers, rest


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_that_deepspeed_s_kernels_replaced(tmp_path: Path, kind: str, ranks: int) -> None:
    write_as_deepspeed(tmp_path, ranks, *as_injected(kind), in_int8=False)
    found = logits(on_meta(kind), checkpoint=str(tmp_path), checkpoint_config={"allow_pickle": True})
    assert torch.equal(found, expected(kind))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_what_is_saved_is_loaded_again(tmp_path: Path, kind: str, dtype: str) -> None:
    first = logits(on_meta(kind), checkpoint=str(tiny_model(kind)), dtype=dtype, save_mp_checkpoint_path=str(tmp_path))
    assert torch.equal(first, expected(kind, dtype))
    again = logits(on_meta(kind), checkpoint=str(tmp_path), dtype=dtype)
    assert torch.equal(again, first)
    if dtype == "int8" and kind == "llama":
        name = "model.layers.1.mlp.down_proj.weight"
        stored = load_file(tmp_path / "tp_00_of_01.safetensors")[name]
        assert stored.dtype == torch.int8


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("int8", [False, True])
def test_shards_of_another_degree(tmp_path: Path, degree: int, int8: bool) -> None:
    whole = open_any(tiny_model("llama"))
    table = table_for(whole.names()).sized(Sizes(4, 2, 384))
    linears = {name: Quantization(8) for name in whole.names() if int8 and name.endswith("_proj.weight")}
    dtype = "int8" if int8 else "float32"
    recast = RecastCheckpoint(whole, torch.bfloat16 if int8 else torch.float32, linears)
    save_mp_checkpoint(tmp_path, recast, table, degree)
    found = logits(on_meta("llama"), checkpoint=str(tmp_path / "ds_inference_config.json"), dtype=dtype)
    assert torch.equal(found, expected("llama", dtype))


def test_one_flat_buffer(tmp_path: Path) -> None:
    save_flat(tmp_path, weights_of("llama"))
    assert torch.equal(logits(on_meta("llama"), checkpoint=str(tmp_path)), expected())


def test_int8_weighs_linears_alone() -> None:
    int8, bfloat16 = expected("llama", "int8"), expected("llama", "bfloat16")
    assert not torch.equal(int8, bfloat16)
    assert (int8 - bfloat16).norm() < 0.1 * bfloat16.norm()


# -- without kernel injection: the model's own code, with the weights of a checkpoint


@torch.inference_mode()
def test_the_model_as_it_is_reads_checkpoints_too(tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    wanted = plain(TOKENS).logits
    folder = str(tiny_model("llama"))
    assert torch.equal(logits(on_meta("llama"), kernel_inject=False, checkpoint=folder), wanted)
    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama", seed=1), dtype=torch.float32)
    saved = {"kernel_inject": False, "save_mp_checkpoint_path": str(tmp_path)}
    assert torch.equal(logits(other, checkpoint=folder, **saved), wanted)
    assert torch.equal(logits(on_meta("llama"), kernel_inject=False, checkpoint=str(tmp_path)), wanted)
    assert torch.equal(logits(folder, kernel_inject=False), wanted)
    assert torch.equal(logits(tiny_model("llama", seed=1), kernel_inject=False, checkpoint=folder), wanted)


def test_empty_parameters_stay_on_the_meta_device() -> None:
    for injected in (True, False):
        engine = init_inference(tiny_model("llama"), dtype="float32", kernel_inject=injected, set_empty_params=True)
        assert {parameter.device.type for parameter in engine.module.parameters()} == {"meta"}


# -- refusals


def test_a_folder_of_pickle_is_read_if_that_is_allowed(tmp_path: Path) -> None:
    torch.save(weights_of("llama"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    for injected in (True, False):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin\), which can run code .*checkpoint_config\.allow_pi"):
            logits(tmp_path, kernel_inject=injected)
        found = logits(tmp_path, kernel_inject=injected, checkpoint_config={"allow_pickle": True})
        torch.testing.assert_close(found, expected(), rtol=1e-4, atol=1e-4)


def test_errors_name_the_tensor_and_the_file(tmp_path: Path) -> None:
    state = weights_of("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**state, name: state[name][:, :40].clone()}, tmp_path / "narrow.safetensors")
    save_file({other: value for other, value in state.items() if other != name}, tmp_path / "short.safetensors")
    whole = (tiny_model("llama") / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    for injected in (True, False):
        for file, message in (
            ("narrow.safetensors", rf"{name}: .*\[64, 40\] in .*narrow\.safetensors"),
            ("short.safetensors", rf"1 missing \({name}\)"),
            ("cut.safetensors", r"cut\.safetensors"),
        ):
            with pytest.raises(CheckpointError, match=message):
                logits(on_meta("llama"), kernel_inject=injected, checkpoint=str(tmp_path / file))


def test_a_model_on_the_meta_device_needs_a_checkpoint() -> None:
    for injected in (True, False):
        with pytest.raises(ValueError, match="checkpoint: the model's weights are on the meta device; say where"):
            logits(on_meta("llama"), kernel_inject=injected)
    with pytest.raises(ValueError, match="Linear is on the meta device, and how it is made anew is not known"):
        logits(nn.Linear(8, 8, device="meta"), kernel_inject=False, checkpoint="x")


def test_every_family_has_a_kind() -> None:
    encoders = {family for family, policy in POLICIES.items() if policy.kind == "encoder"}
    assert POLICIES.keys() - ONE_EACH.keys() == encoders | {"qwen", "megatron_gpt_moe"}, (
        "which transformers does not have"
    )
