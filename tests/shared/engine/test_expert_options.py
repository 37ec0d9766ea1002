"""DeepSpeed-MoE's models, pyramids and residual mixtures, against their formulas; what the options say of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.engine import init_inference
from shared.policies.policy import UnsupportedModelError
from shared.policies.table import architecture_of
from tests.megatron_moe import SIZES, MegatronMoe
from tests.tiny_encoders import tiny_encoder
from tests.tiny_models import tiny_model

TOKENS = torch.randint(0, 95, (2, 17), generator=torch.Generator().manual_seed(5))
# every second layer, by the first of Megatron's arguments; a pyramid; two experts for each token
MODELS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "standard": ([0, 4, 0, 4], {"num_experts": [4]}),
    "residual pyramid": ([0, 2, 0, 6], {"num_experts": [2, 6], "mlp_type": "residual"}),
    "two for each token": ([3, 3], {"num_experts": 3, "topk": 2, "expert_interval": 1}),
    "all residual": ([2, 5], {"num_experts": [2, 5], "topk": 2, "expert_interval": 1, "mlp_type": "residual"}),
}


def injected(model: Any, **options: Any) -> Any:
    return init_inference(model, **{"dtype": "float32", "kernel_inject": True, "max_tokens": 64, **options})


def check_equal(engine: Any, model: MegatronMoe) -> None:
    expected = model(TOKENS)
    assert expected.std() > 0.5, "flat logits would prove nothing"
    torch.testing.assert_close(engine(TOKENS).logits.double(), expected, atol=1e-4, rtol=1e-4)
    alone = torch.cat([engine(row[None]).logits for row in TOKENS])
    assert torch.equal(engine(TOKENS).logits, alone)
    row = TOKENS[:1]
    assert torch.equal(engine.generate(row, max_new_tokens=8, do_sample=False)[0], model.greedy(row[0], 8))


@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_computes_its_formulas(name: str) -> None:
    counts, config = MODELS[name]
    model = MegatronMoe(counts, **config)
    engine = injected(model)
    check_equal(engine, model)
    engine.destroy()


@pytest.mark.parametrize("name", ["standard", "residual pyramid"])
def test_the_options_say_what_the_config_does_not(name: str) -> None:
    counts, config = MODELS[name]
    model = MegatronMoe(counts, mlp_type=config.get("mlp_type", "standard"))
    moe = {"moe_experts": config["num_experts"], "type": model.config.pop("mlp_type")}
    engine = injected(model, moe=moe)
    check_equal(engine, model)
    engine.destroy()
    sizes = {"n_embd": "hidden_size", "n_inner": "ffn_hidden_size", "n_layer": "num_layers"}
    sizes |= {
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "vocab_size": "padded_vocab_size",
    }
    model.config = {"model_type": "gpt2", **{theirs: model.config[ours] for theirs, ours in sizes.items()}}
    engine = injected(model, moe=moe)
    check_equal(engine, model)
    engine.destroy()


def flat(model: MegatronMoe, version: int) -> dict[str, Tensor]:
    """The state dict as Megatron's first versions had it: flat names, fused rows by kind."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("language_model.").removeprefix("embedding.").replace("self_attention", "attention")
        if "query_key_value" in name and version == 0:
            value = value.unflatten(0, (SIZES["num_attention_heads"], 3, -1)).transpose(0, 1).flatten(0, 2)
        found[name.replace("encoder.", "transformer.")] = value.float().contiguous()
    return found


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("name", ["residual pyramid", "two for each token"])
def test_megatrons_own_files(name: str, version: int, tmp_path: Path) -> None:
    counts, config = MODELS[name]
    model = MegatronMoe(counts, **config)
    save_file(flat(model, version), tmp_path / "whole.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    description = {"type": "Megatron", "checkpoints": [str(tmp_path / "whole.safetensors")], "version": version}
    engine = injected(tmp_path, checkpoint=description)
    check_equal(engine, model)
    engine.destroy()


def test_experts_where_a_residual_mixture_had_them_first(tmp_path: Path) -> None:
    model = MegatronMoe([2, 2], num_experts=2, expert_interval=1, mlp_type="residual")
    state = {name.replace("mlp.deepspeed_moe", "mlp.moe.deepspeed_moe"): v for name, v in model.state_dict().items()}
    assert len(state.keys() - model.state_dict().keys()) == 18
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    engine = injected(tmp_path)
    check_equal(engine, model)
    engine.destroy()


def test_experts_of_int8_are_near() -> None:
    model = MegatronMoe(*MODELS["residual pyramid"][:1], **MODELS["residual pyramid"][1])
    engine = injected(model, dtype="int8")
    expected = model(TOKENS)
    apart = (engine(TOKENS).logits - expected).norm() / expected.norm()
    assert apart < 0.05
    engine.destroy()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_saved_is_read_again(dtype: str, tmp_path: Path) -> None:
    counts, config = MODELS["residual pyramid"]
    saving = injected(MegatronMoe(counts, **config), dtype=dtype, save_mp_checkpoint_path=str(tmp_path))
    reading = injected(MegatronMoe(counts, **config).to("meta"), dtype=dtype, checkpoint=str(tmp_path))
    assert torch.equal(reading(TOKENS).logits, saving(TOKENS).logits)
    for engine in (saving, reading):
        engine.destroy()


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "other numbers": ({"moe_experts": [8]}, r"moe\.moe_experts: \[8\], and the layers .* have \[4, 4\]; leave it out"),
    "too many": ({"moe_experts": [4, 4, 4]}, r"moe\.moe_experts: \[4, 4, 4\], and the layers .* have \[4, 4\]"),
    "another type": ({"type": "residual"}, r"moe\.type: 'residual', and the model's own config says standard"),
    "none": (False, r"moe\.enabled: false, and the model has experts; leave it out"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_that_contradict_the_config(case: str) -> None:
    moe, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        injected(MegatronMoe([0, 4, 0, 4], num_experts=[4], mlp_type="standard"), moe=moe)


def test_what_says_the_same_as_the_config_is_no_contradiction() -> None:
    counts, config = MODELS["residual pyramid"]
    injected(MegatronMoe(counts, **config), moe={"moe_experts": [2, 6], "type": "residual"}).destroy()
    injected(tiny_model("mixtral"), moe={"moe_experts": [4], "type": "standard"}).destroy()
    with pytest.raises(ValueError, match=r"moe\.type: 'standard', and the model's own config says residual"):
        injected(MegatronMoe(counts, **config), moe={"type": "standard"})


@pytest.mark.parametrize(("name", "value"), [("moe_experts", [4]), ("type", "residual")])
def test_a_model_without_experts_is_given_none(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"moe\.{name}: .*, and the model has no experts; leave it out"):
        injected(tiny_model("llama"), moe={name: value})
    for model, inject in ((tiny_model("llama"), False), (tiny_encoder(), True)):
        with pytest.raises(ValueError, match=rf"moe\.{name}: .* is for a decoder's fused layers; set kernel_inject"):
            injected(model, moe={name: value}, kernel_inject=inject)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": [2, 2, 2]}, "num_experts: has 3 numbers, and 2 layers have experts"),
        ({"num_experts": [4, 2], "topk": 3}, "topk: 3, and there are layers of 2 experts"),
        ({"num_experts": [4], "topk": 0}, "topk: 0, and there are layers of 4 experts"),
        ({"num_experts": [4], "mlp_type": "dense"}, "mlp_type: 'dense' is not standard or residual"),
        ({"num_experts": "4"}, "num_experts: wants a whole number, has '4'"),
    ],
)
def test_a_config_that_is_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        architecture_of({**SIZES, **fields})


def test_layers_of_one_expert_are_layers_with_an_mlp() -> None:
    assert architecture_of({**SIZES, "num_experts": [1]}).experts is None
    experts = architecture_of({**SIZES, "num_experts": [1, 4]}).experts
    assert experts
    assert experts.counts == (0, 0, 0, 4)
    assert not experts.renormalize, "the weight of the best is its score"
