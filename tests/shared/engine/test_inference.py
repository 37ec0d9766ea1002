"""An inference engine's life: what it takes, what it is as a module, two of them, and none any more."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import pipeline

from shared.engine import InferenceEngine, init_inference
from tests.injected import injected, num_free, plain_model, prompts, reference
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_two_engines_live_beside_each_other() -> None:
    ids = prompts()
    short = init_inference(plain_model("llama"), kernel_inject=True, dtype="float32", max_out_tokens=16)
    other = init_inference(plain_model("gpt2"), kernel_inject=True, dtype="bf16", max_out_tokens=64)
    plain = init_inference(plain_model("bloom"), dtype="float32")
    first, second = short(ids), other(ids)
    third = plain(ids)
    for _ in range(2):
        step = short(ids[:, :1], past_key_values=first.past_key_values)
        other(ids[:, :1], past_key_values=second.past_key_values)
    torch.testing.assert_close(first.logits, reference("llama")(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(third.logits, reference("bloom")(ids).logits)
    assert (short.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    assert step.past_key_values.get_seq_length() == 14
    with pytest.raises(RuntimeError, match="maximum length of 16"):
        short.generate(ids, max_new_tokens=8)
    other.destroy()
    assert torch.equal(short(ids).logits, first.logits)


@pytest.mark.parametrize("inject", [True, False])
def test_destroy_frees_weights_and_pool(inject: bool) -> None:
    model = plain_model("llama")
    engine = init_inference(model, kernel_inject=inject, dtype="float32")
    out = engine(prompts())
    kept: list[Any] = [weakref.ref(model)] if not inject else []
    if inject:
        assert engine._injection
        assert engine._injection.causal_lm
        inner = engine._injection.causal_lm.engine
        weights = inner._decoder._weights
        kept = [weakref.ref(weights), weakref.ref(weights.embedding), weakref.ref(inner.kv.pool)]
        del weights
        del inner
    engine.profile_model_time()
    del model
    engine.destroy()
    engine.destroy()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    del out  # a cache that outlives its engine has nothing to free
    for call in (lambda: engine(prompts()), lambda: engine.generate(prompts()), engine.profile_model_time):
        with pytest.raises(RuntimeError, match="this engine was destroyed"):
            call()


def test_as_a_module_it_is_where_and_what_it_is(tmp_path: Path) -> None:
    engine = injected("llama")
    assert engine.to("cpu") is engine
    assert engine.to(torch.float32) is engine
    assert engine.eval() is engine
    assert engine.module.float() is engine.module
    for change in (engine.half, engine.module.bfloat16, lambda: engine.to("meta"), engine.double):
        with pytest.raises(RuntimeError, match=r"the injected layers compute in torch.float32 on cpu, and cannot be"):
            change()
    save = functools.partial(engine.module.save_pretrained, tmp_path)
    for call in (engine.state_dict, lambda: engine.load_state_dict({}), save):
        with pytest.raises(RuntimeError, match="state_dict: the injected layers have their weights fused"):
            call()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_that_is_not_injected_is_a_module_as_any() -> None:
    engine = init_inference(plain_model("llama"), dtype="bf16")
    assert engine(prompts()).logits.dtype == torch.bfloat16
    engine.float()
    torch.testing.assert_close(engine(prompts()).logits, reference("llama")(prompts()).logits, atol=0.2, rtol=0.2)
    engine.module.load_state_dict(reference("llama").state_dict())
    # the rope's table has been bfloat16 once
    torch.testing.assert_close(engine(prompts()).logits, reference("llama")(prompts()).logits, atol=1e-2, rtol=1e-2)


def test_what_an_engine_does_not_have_its_module_has() -> None:
    engine = injected("llama")
    assert engine.config is engine.module.config
    assert engine.can_generate()
    assert engine.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no_such_thing"):
        engine.no_such_thing  # noqa: B018


def test_a_pipeline_of_transformers_runs_on_it() -> None:
    texts = ["The quick brown fox", "Rome"]
    wants: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    made = pipeline("text-generation", model=plain_model("llama"), tokenizer=tiny_tokenizer())
    expected = made(texts, **wants)
    made.model = init_inference(made.model, kernel_inject=True, dtype="float32")  # pyright: ignore[reportAttributeAccessIssue]
    assert made(texts, **wants) == expected


def test_fields_of_the_models_config_are_overruled() -> None:
    model = plain_model("llama")
    engine = init_inference(model, kernel_inject=True, dtype="float32", args={"rms_norm_eps": 0.5})
    changed = plain_model("llama")
    for part in changed.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 0.5
    expected = changed(prompts()).logits
    torch.testing.assert_close(engine(prompts()).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - reference("llama")(prompts()).logits).abs().max() > 0.1


@pytest.mark.parametrize("inject", [True, False])
def test_a_model_without_weights_waits_for_them(inject: bool) -> None:
    engine = init_inference(plain_model("llama"), kernel_inject=inject, dtype="float32", set_empty_params=True)
    assert all(parameter.is_meta for parameter in engine.module.parameters())
    for call in (lambda: engine(prompts()), lambda: engine.generate(prompts())):
        with pytest.raises(RuntimeError, match="set_empty_params: the model has no weights yet; load_state_dict"):
            call()
    engine.load_state_dict(reference("llama").state_dict())
    torch.testing.assert_close(engine(prompts()).logits, reference("llama")(prompts()).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(
        engine.generate(prompts(), max_new_tokens=5, do_sample=False),
        reference("llama").generate(prompts(), max_new_tokens=5, do_sample=False),
    )


def test_a_folder_is_read_either_way() -> None:
    folder, ids = str(tiny_model("llama")), prompts()
    expected = reference("llama")(ids).logits
    assert torch.equal(init_inference(folder, dtype="float32")(ids).logits, expected)
    fused = init_inference(folder, kernel_inject=True, dtype="float32")
    torch.testing.assert_close(fused(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert num_free(fused) > 0


def test_less_memory_than_min_out_tokens_take_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Workspace can't be allocated, not enough memory: 10{12} tokens \(min_out"):
        init_inference(
            plain_model("llama"), kernel_inject=True, dtype="float32", max_out_tokens=10**12, min_out_tokens=10**12
        )


def test_max_out_tokens_beyond_the_models_own_positions_are_the_models() -> None:
    engine = init_inference(plain_model("gpt2"), kernel_inject=True, dtype="float32", max_out_tokens=4000)
    with pytest.raises(RuntimeError, match=r"maximum length of 2048\. The model has positions for no more"):
        engine.generate(prompts(1, 2040), max_new_tokens=20)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": torch.float64}, ValueError, "float64"),
        ({"dtype": 16}, TypeError, "Invalid type for dtype"),
        ({"max_out_tokens": 0}, ValueError, "max_out_tokens"),
        ({"enable_cuda_graph": True, "tp": {"tp_size": 2}}, ValueError, "Cuda graph is not supported for model paral"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        init_inference(nn.Linear(2, 2), **{"dtype": "float32", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_graph_of_a_model_that_is_not_injected_needs_a_cuda_device() -> None:
    with pytest.raises(ValueError, match="enable_cuda_graph: there is no CUDA device"):
        init_inference(plain_model("llama"), dtype="float32", enable_cuda_graph=True)
    engine = init_inference(plain_model("llama"), kernel_inject=True, dtype="float32", enable_cuda_graph=True)
    assert isinstance(engine, InferenceEngine)  # whose steps a CPU replays anyway
    expected = reference("llama").generate(prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(engine.generate(prompts(), max_new_tokens=5, do_sample=False), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("inject", [True, False])
def test_graphs_on_a_cuda_device_change_nothing(inject: bool) -> None:
    engine = init_inference(plain_model("llama"), kernel_inject=inject, dtype="float32", enable_cuda_graph=True)
    model = plain_model("llama").cuda()
    for ids in (prompts().cuda(), prompts(2).cuda(), prompts().cuda() + 1):
        first = engine(ids)
        engine(ids + 1)
        torch.testing.assert_close(first.logits, model(ids).logits, atol=1e-2, rtol=1e-2)
    out = engine.generate(prompts().cuda(), max_new_tokens=8, do_sample=False)
    assert torch.equal(out, model.generate(prompts().cuda(), max_new_tokens=8, do_sample=False))


def test_what_a_model_contradicts_is_refused() -> None:
    with pytest.raises(ValueError, match="triangular_masking: false, and a decoder's tokens attend to no later ones"):
        init_inference(tiny_model("llama"), kernel_inject=True, dtype="float32", triangular_masking=False)
    with pytest.raises(ValueError, match=r"moe\.enabled: false, and the model has experts"):
        init_inference(tiny_model("mixtral"), kernel_inject=True, dtype="float32", moe=False)
    init_inference(tiny_model("llama"), kernel_inject=True, dtype="float32", moe=False).destroy()
