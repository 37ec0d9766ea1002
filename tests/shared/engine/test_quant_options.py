"""`config.quant` obeyed, with fused layers and without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.quantization import Quantization
from shared.engine import InferenceEngine, init_inference
from shared.engine.quantized_modules import QuantizedEmbedding, QuantizedLinear
from shared.models.weights import ModelWeights
from tests.injected import plain_model, prompts, reference
from tests.live_bytes import LiveBytes
from tests.tiny_models import deep_model, tiny_model

INT4 = {"num_bits": 4, "group_size": 32, "symmetric": False}


def engine_of(model: Any, *, kernel_inject: bool = False, dtype: str = "float32", **options: Any) -> InferenceEngine:
    options = {"quant": {"weight": options}} if options and "quant" not in options else options
    return init_inference(model, kernel_inject=kernel_inject, dtype=dtype, **options)


def fused(engine: InferenceEngine) -> ModelWeights:
    assert engine._injection
    assert engine._injection.causal_lm
    return engine._injection.causal_lm.engine._decoder._weights


def forms(engine: InferenceEngine) -> dict[str, Quantization | None]:
    """Of every matrix of the fused layers."""
    weights = fused(engine)
    named = {
        f"layers.{index}.{name}": getattr(layer, name)
        for index, layer in enumerate(weights.layers)
        for name in ("qkv", "output", "up", "down")
    }
    return {name: part.quantization for name, part in {**named, "lm_head": weights.lm_head}.items()}


def replaced(engine: InferenceEngine) -> dict[str, Quantization]:
    """Of every layer of the model's own code that was replaced."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: part.how for name, part in engine.module.named_modules() if isinstance(part, kinds)}


def dense(engine: InferenceEngine, kind: str) -> Any:
    """The model with the floats that an engine's integers stand for."""
    model = plain_model(kind)
    for name, part in engine.module.named_modules():
        if isinstance(part, QuantizedLinear | QuantizedEmbedding):
            own = model.get_submodule(name)
            turned = isinstance(part, QuantizedLinear) and part.turned
            own.weight = nn.Parameter(part.weight.T.contiguous() if turned else part.weight)
    return model


@torch.inference_mode()
def logits(model: Callable[..., Any]) -> Tensor:
    return model(prompts()).logits


# -- without fused layers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_every_linear_and_embedding_by_quantized_initialization(kind: str) -> None:
    engine = engine_of(plain_model(kind), quantized_initialization=INT4)
    names = [name for name, module in reference(kind).named_modules() if _is_layer(module)]
    assert replaced(engine) == dict.fromkeys(names, Quantization(4, 32, symmetric=False))
    assert len(names) > 6
    expected = logits(dense(engine, kind))
    torch.testing.assert_close(logits(engine), expected, rtol=1e-3, atol=1e-3)
    assert (expected - logits(reference(kind))).abs().mean() > 0.01
    tokens = engine.generate(prompts(), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (3, 16)


def _is_layer(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == "Conv1D"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_int8_without_fused_layers(kind: str) -> None:
    engine = engine_of(plain_model(kind), dtype="int8")
    found = replaced(engine)
    assert set(found.values()) == {Quantization(8)}
    assert "lm_head" in found
    exact = logits(init_inference(plain_model(kind), dtype="bf16"))
    assert 0 < (logits(engine) - exact).float().norm() < 0.1 * exact.float().norm()
    assert logits(engine).dtype == torch.bfloat16


def test_from_a_folder_it_has_the_same_bits_and_never_all_floats() -> None:
    folder = deep_model()
    sizes = [value.nbytes for value in load_file(folder / "model.safetensors").values()]
    quant = {"weight": {"quantized_initialization": {"num_bits": 8}}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with LiveBytes() as live:
            engine = init_inference(folder, dtype="bf16", quant=quant)
    finally:
        torch.set_num_threads(threads)
    assert live.now < 0.7 * sum(sizes)
    assert live.peak < live.now + 16 * max(sizes) < 0.95 * sum(sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(engine), logits(init_inference(model, dtype="bf16", quant=quant)))
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(model.config)
    again = init_inference(on_meta, checkpoint=str(folder), dtype="bf16", quant=quant)
    assert torch.equal(logits(again), logits(engine))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "folder"])
def test_saved_without_fused_layers_and_read_again(kind: str, in_memory: bool, tmp_path: Path) -> None:
    quant = {"weight": {"quantized_initialization": INT4}}
    model = plain_model(kind) if in_memory else str(tiny_model(kind))
    first = init_inference(model, dtype="float32", quant=quant, save_mp_checkpoint_path=str(tmp_path))
    again = init_inference(plain_model(kind), dtype="float32", quant=quant, checkpoint=str(tmp_path))
    config = reference(kind).config
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(config)
    from_meta = init_inference(on_meta, dtype="float32", quant=quant, checkpoint=str(tmp_path))
    assert torch.equal(logits(from_meta), logits(first))
    if kind == "llama":
        stored = load_file(tmp_path / "tp_00_of_01.safetensors")
        assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
        assert stored["model.layers.0.mlp.down_proj.weight.offset"].shape == (64, 3)
    # a model in memory has floats again, and rounds them anew
    torch.testing.assert_close(logits(again), logits(first), rtol=0.05, atol=0.05)


def test_some_by_their_names() -> None:
    keys = {"mlp.down_proj": INT4, "layers.1.self_attn": {"num_bits": 8, "group_size": 16}, "embed": {}}
    engine = engine_of(plain_model("llama"), post_init_quant=keys)
    expected: dict[str, Quantization] = {
        f"model.layers.{layer}.mlp.down_proj": Quantization(4, 32, symmetric=False) for layer in range(3)
    }
    attention = {f"model.layers.1.self_attn.{name}_proj": Quantization(8, 16, symmetric=False) for name in "qkvo"}
    assert replaced(engine) == {**expected, **attention, "model.embed_tokens": Quantization(8, symmetric=False)}
    torch.testing.assert_close(logits(engine), logits(_tied_apart(engine)), rtol=1e-3, atol=1e-3)


def _tied_apart(engine: InferenceEngine) -> Any:
    """Its output layer is the embedding as it was."""
    model, head = dense(engine, "llama"), reference("llama").lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach().clone())
    return model


@pytest.mark.parametrize("kernel_inject", [True, False])
def test_keys_that_cannot_be(kernel_inject: bool) -> None:
    for keys, message in (
        (
            {"mlp": INT4, "down_proj": INT4},
            r"layers\.0\.mlp\.down_proj\.weight is matched by 'mlp' and by 'down_proj'",
        ),
        ({"mlp": INT4, "fc1": INT4}, "'fc1' is in the name of no parameter that is quantized"),
        ({"mlp": {"group_size": 40}}, r"64 input features cannot be cut into groups of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_of(plain_model("llama"), kernel_inject=kernel_inject, post_init_quant=keys)


def test_what_there_is_not_to_quantize() -> None:
    with pytest.raises(ValueError, match=r"quant: Sequential has no nn\.Linear that it could quantize"):
        engine_of(nn.Sequential(nn.LayerNorm(4)), dtype="int8")
    with pytest.raises(ValueError, match=r"quant\.qkv\.enabled: false, and which linears these are is not known"):
        engine_of(nn.Sequential(nn.Linear(4, 4)), dtype="int8", quant={"qkv": {"enabled": False}})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_queries_keys_and_values_are_left(kind: str) -> None:
    own = {"llama": ("q_proj", "k_proj", "v_proj"), "gpt2": ("c_attn",)}[kind]
    every = replaced(engine_of(plain_model(kind), dtype="int8"))
    left = replaced(engine_of(plain_model(kind), dtype="int8", quant={"qkv": {"enabled": False}}))
    assert left.keys() == {name for name in every if not name.endswith(own)}
    assert len(left) < len(every)
    quant = {"qkv": {"enabled": False}}
    injected = forms(engine_of(plain_model("llama"), kernel_inject=True, dtype="int8", quant=quant))
    assert {name for name, how in injected.items() if how is None} == {f"layers.{layer}.qkv" for layer in range(3)}


def test_weights_come_later() -> None:
    engine = engine_of(plain_model("llama"), dtype="int8", set_empty_params=True, quant={})
    engine.load_state_dict(reference("llama").state_dict())
    assert torch.equal(logits(engine), logits(engine_of(plain_model("llama"), dtype="int8")))


# -- with fused layers


@pytest.mark.parametrize(
    ("weight", "layers"),
    [
        ({}, Quantization(8)),
        ({"num_bits": 4, "q_groups": 2}, Quantization(4, 32)),
        ({"q_type": "asymmetric"}, Quantization(8, symmetric=False)),
        ({"num_bits": 8, "q_type": "float"}, Quantization(8, floating=True)),
        ({"num_bits": 6, "q_type": "float"}, Quantization(6, floating=True)),
    ],
)
def test_how_int8_quantizes(weight: dict[str, Any], layers: Quantization) -> None:
    for kernel_inject in (True, False):
        engine = engine_of(plain_model("llama"), kernel_inject=kernel_inject, dtype="int8", quant={"weight": weight})
        found = forms(engine) if kernel_inject else replaced(engine)
        for name, how in found.items():
            if name == "lm_head" and kernel_inject:
                assert how == Quantization(8)
            elif name.endswith(("down", "down_proj")) and layers.group:
                assert how == Quantization(4, 48), "96 input features in two groups"
            else:
                assert how == layers, name
        exact = logits(reference("llama"))
        assert 0 < (logits(engine).float() - exact).norm() < (0.6 if layers.bits == 4 else 0.35) * exact.norm()
    with pytest.raises(ValueError, match="64 input features cannot be cut into 7 groups"):
        engine_of(plain_model("llama"), kernel_inject=True, dtype="int8", quant={"weight": {"q_groups": 7}})


def test_rows_that_become_int8_as_they_come() -> None:
    quant = {"activation": {"dynamic": True}}
    for kernel_inject in (True, False):
        dynamic = engine_of(plain_model("llama"), kernel_inject=kernel_inject, dtype="int8", quant=quant)
        found = forms(dynamic) if kernel_inject else replaced(dynamic)
        own = {how for name, how in found.items() if name != "lm_head"}
        assert own == {Quantization(8, dynamic=True)}
        weights_alone = engine_of(plain_model("llama"), kernel_inject=kernel_inject, dtype="int8", quant={})
        expected = logits(weights_alone).float()
        assert 0 < (logits(dynamic).float() - expected).norm() < 0.1 * expected.norm()
        assert torch.equal(logits(dynamic)[:1], dynamic(prompts()[:1]).logits), "a row's scale is its own"


def test_quantized_initialization_of_fused_layers() -> None:
    engine = engine_of(tiny_model("llama"), kernel_inject=True, quantized_initialization=INT4)
    assert set(forms(engine).values()) == {Quantization(4, 32, symmetric=False)}
    apart = engine_of(tiny_model("llama"), quantized_initialization=INT4)
    # the embedding of fused layers is looked up as it is
    for name, part in apart.module.named_modules():
        if isinstance(part, QuantizedEmbedding):
            apart.module.set_submodule(name, reference("llama").get_submodule(name))
    torch.testing.assert_close(logits(engine), logits(apart), rtol=1e-3, atol=1e-3)


def test_keys_of_fused_layers() -> None:
    attention_8 = {"num_bits": 8, "group_size": 16}
    keys = {"mlp.down_proj": INT4, "layers.1.self_attn": attention_8, "lm_head": {"symmetric": True}}
    engine = engine_of(tiny_model("llama-untied-biased"), kernel_inject=True, post_init_quant=keys)
    found = {name: how for name, how in forms(engine).items() if how is not None}
    down = {f"layers.{layer}.down": Quantization(4, 32, symmetric=False) for layer in range(3)}
    attention = dict.fromkeys(("layers.1.qkv", "layers.1.output"), Quantization(8, 16, symmetric=False))
    assert found == {**down, **attention, "lm_head": Quantization(8)}
    for keys, message in (
        (
            {"q_proj": INT4},
            r"0\.self_attn\.q_proj\.weight and .*0\.self_attn\.k_proj\.weight are one linear",
        ),
        (
            {"gate_proj": INT4, "up_proj": {}},
            r"gate_proj\.weight and .*up_proj\.weight are one linear of the fused",
        ),
        (
            {"embed_tokens": INT4},
            r"model\.embed_tokens\.weight is looked up row by row as it is by fused",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine_of(tiny_model("llama-untied-biased"), kernel_inject=True, post_init_quant=keys)
    mixtral = engine_of(tiny_model("mixtral"), kernel_inject=True, post_init_quant={"experts": {"num_bits": 8}})
    for layer in fused(mixtral).layers:
        assert layer.qkv.quantization is None
        assert layer.experts_up
        assert layer.experts_up.quantization == Quantization(8, symmetric=False)
