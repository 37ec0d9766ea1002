"""Policies that users give: of families that nobody knows, of one that transformers lacks, and DeepSpeed's form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from examples.custom_policy import INTERNLM2, random_model
from shared.checkpoint import CheckpointError
from shared.engine import InferenceEngine, init_inference
from shared.policies.llama import LLAMA
from shared.policies.policy import UnsupportedModelError
from tests.tiny_models import tiny_model

GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randint(3, 384, (2, 21), generator=GENERATOR)


def injected(model: Any, **options: Any) -> InferenceEngine:
    return init_inference(model, **{"dtype": "float32", "kernel_inject": True, "max_tokens": 64, **options})


def tiny(kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32)


@torch.inference_mode()
def check_equal(engine: InferenceEngine, reference: Any, tolerance: float = 1e-4) -> None:
    expected = reference(TOKENS).logits
    assert expected.std() > 0.3, "flat logits would prove nothing"
    torch.testing.assert_close(engine(TOKENS).logits, expected, rtol=tolerance, atol=tolerance)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(engine.generate(TOKENS, **how), reference.generate(TOKENS, **how))


def internlm2_names(state: dict[str, Tensor], kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """A llama's parameters by the names of InternLM 2."""
    renamed = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            groups = [part.unflatten(0, (kv_heads, -1, head_dim)) for part in parts]
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(groups, 1).flatten(0, 2)
            continue
        theirs, ours = next(((a, b) for a, b in renamed.items() if a in name), ("", ""))
        found[name.replace(theirs, ours)] = value
    return {name: value.contiguous() for name, value in found.items()}


@pytest.fixture
def internlm2(tmp_path: Path) -> Path:
    """The folder of a model of a family that neither we nor transformers know: the tiny llama under other names."""
    config = json.loads((tiny_model("llama-linear") / "config.json").read_text())
    folder = tmp_path / "internlm2"
    folder.mkdir()
    state = load_file(tiny_model("llama-linear") / "model.safetensors")
    save_file(internlm2_names(state, kv_heads=2, head_dim=16), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "internlm2"}))
    return folder


def test_a_folder_of_a_family_that_nobody_knows(internlm2: Path) -> None:
    check_equal(injected(internlm2, injection_policy=INTERNLM2), tiny("llama-linear"))


def test_without_the_policy_it_is_refused_by_name(internlm2: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'internlm2' is none of .*, and transformers has no class"):
        injected(internlm2)


def test_a_plain_module_with_a_config_of_its_own() -> None:
    model = random_model()
    engine = injected(model, injection_policy=INTERNLM2)
    with torch.inference_mode():
        torch.testing.assert_close(engine(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)
    model.config = dataclasses.asdict(model.config)  # pyright: ignore[reportAttributeAccessIssue] - a mapping will do
    again = injected(model, injection_policy=INTERNLM2, args={"hidden_act": "relu"})
    with torch.inference_mode():
        assert not torch.equal(again(TOKENS).logits, engine(TOKENS).logits)


def test_a_policy_of_the_user_s_comes_before_ours() -> None:
    """Of a family that we know: this one has no output layer of its own, whatever the config says."""
    tied = dataclasses.replace(LLAMA, record={**LLAMA.record, "tie_embeddings": True}, ignored=(r"lm_head\.weight",))
    model = tiny("llama-untied-biased")
    engine = injected(model, injection_policy=tied)
    model.lm_head.weight = model.model.embed_tokens.weight
    check_equal(engine, model)


def test_a_policy_whose_names_are_not_there_names_them() -> None:
    with pytest.raises(CheckpointError, match=r"missing \(.*attention\.wqkv.*not expected by this family \(.*lm_head"):
        injected(tiny("llama-untied-biased"), injection_policy=INTERNLM2)


def qwen_folder(folder: Path) -> PreTrainedModel:
    """The first Qwen, from a Qwen 2 with a key and a value for each query, which it gives back."""
    fields: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0},
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **fields), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    state: dict[str, Tensor] = model.state_dict()
    renamed = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight"}
    found: dict[str, Tensor] = {
        renamed.get(name, name): value for name, value in state.items() if ".layers." not in name
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{new}attn.c_attn.{kind}"] = torch.cat(parts)
        for theirs, ours in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            found[f"{new}{ours}.weight"] = state[f"{old}{theirs}.weight"]
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "model.safetensors")
    kept = {name: value for name, value in fields.items() if name not in ("rms_norm_eps", "rope_parameters")}
    config = {
        **kept,
        "model_type": "qwen",
        "intermediate_size": 192,  # of gate and up together
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 5_000,
        "seq_length": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_the_first_qwen_which_transformers_does_not_have(tmp_path: Path) -> None:
    reference = qwen_folder(tmp_path / "qwen")
    check_equal(injected(tmp_path / "qwen"), reference)
    with pytest.raises(UnsupportedModelError, match="transformers has no class for 'qwen'; give the model itself"):
        injected(tmp_path / "qwen", kernel_inject=False)


# -- DeepSpeed's form: {module class: suffixes}


@torch.inference_mode()
def test_deepspeed_s_form_leaves_the_model_as_it_is() -> None:
    model = tiny("llama")
    expected = model(TOKENS).logits
    kind = type(model.model.layers[0])
    for suffixes in ("self_attn.o_proj", ("self_attn.o_proj", "mlp.down_proj")):
        engine = injected(model, kernel_inject=False, injection_policy={kind: suffixes})
        assert engine.module is model
        assert torch.equal(engine(TOKENS).logits, expected)


def test_deepspeed_s_form_is_checked() -> None:
    model = tiny("llama")
    kind = type(model.model.layers[0])
    with pytest.raises(ValueError, match=r"Injection policy layer'self_attn\.dense' not valid\."):
        injected(model, kernel_inject=False, injection_policy={kind: ("self_attn.o_proj", "self_attn.dense")})
    with pytest.raises(ValueError, match=r"'LlamaDecoderLayer' is no subclass of torch\.nn\.Module"):
        injected(model, kernel_inject=False, injection_policy={"LlamaDecoderLayer": ("self_attn.o_proj",)})
    with pytest.raises(ValueError, match="injection_policy: names layers to split as they are, and replace_with_kern"):
        injected(model, injection_policy={kind: ("self_attn.o_proj",)})
    with pytest.raises(ValueError, match="injection_policy: a Policy is for fused layers; set kernel_inject"):
        injected(model, kernel_inject=False, injection_policy=LLAMA)
