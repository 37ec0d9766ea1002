"""Architectures without a policy: found and proven, or refused saying what is not understood or differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from examples.custom_policy import random_model
from shared.engine import init_inference
from shared.engine.detection import detected
from shared.policies.policy import UnsupportedModelError
from tests.tiny_models import KINDS, tiny_model

TOKENS = torch.randint(3, 384, (2, 21), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ONE_EACH: dict[str, object] = {"num_key_value_heads": None}
GPT: dict[str, object] = {**ONE_EACH, "intermediate_size": None}
# what transformers calls it -> what its config has beside the sizes; of most of them we have no policy
STRANGERS: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True},
    "olmo": {"clip_qkv": 0.5},
    "starcoder2": {"sliding_window": 24},
    "cohere": {"logit_scale": 0.25},
    "smollm3": {"no_rope_layers": [1, 1]},
    "exaone4": {"sliding_window": None},
    "biogpt": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {**ONE_EACH, "rotary_pct": 0.5},
    "falcon": {**GPT, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"head_dim": 24, "sliding_window": 20, "attn_logit_softcapping": 5.0},
}


def stranger(kind: str, **fields: object) -> Any:
    """A model of that kind whose class and config say that they are something else."""
    given: dict[str, Any] = {name: value for name, value in {**SIZES, **fields}.items() if value is not None}
    known = type(AutoConfig.for_model(kind))
    config = type(f"Strange{known.__name__}", (known,), {"model_type": "stranger"})(**given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = type(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)))
        model = type(f"Strange{base.__name__}", (base,), {"config_class": type(config)})(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, *((-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)))
    return model.eval()


def injected(model: Any, **options: Any) -> Any:
    return init_inference(model, **{"dtype": "float32", "kernel_inject": True, "max_tokens": 64, **options})


@torch.inference_mode()
def check_equal(engine: Any, reference: Any) -> None:
    expected = reference(TOKENS).logits
    assert expected.std() > 0.1, "flat logits would prove nothing"
    torch.testing.assert_close(engine(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(engine.generate(TOKENS, **how), reference.generate(TOKENS, **how))


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_answers_as_its_own_code(kind: str) -> None:
    model = stranger(kind, **STRANGERS[kind])
    assert model.config.to_dict()["model_type"] == "stranger"
    check_equal(injected(model), model)


@torch.inference_mode()
def test_a_plain_module_needs_no_policy_either() -> None:
    """Query, key and value fused by groups, and a config that is a dataclass."""
    model = random_model()
    torch.testing.assert_close(injected(model)(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_folder_that_only_transformers_knows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **SIZES), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    check_equal(injected(tmp_path), model)


@torch.inference_mode()
def test_the_weights_that_are_served_are_the_ones_that_are_proven() -> None:
    folder = str(tiny_model("llama", seed=1))
    known = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fields = {
        name: getattr(known.config, name) for name in ("num_hidden_layers", "tie_word_embeddings", "rms_norm_eps")
    }
    assert torch.equal(
        injected(stranger("llama", **fields), checkpoint=folder)(TOKENS).logits, injected(known)(TOKENS).logits
    )


@torch.inference_mode()
def test_a_model_in_bfloat16_is_compared_in_float32_and_left_alone() -> None:
    model = stranger("llama")
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16()
    engine = injected(model, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    same = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16)
    same.load_state_dict(model.state_dict())
    assert torch.equal(engine(TOKENS).logits, injected(same, dtype="bfloat16")(TOKENS).logits)


# -- what is not as it seems is refused


def other_eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3


def other_theta(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 1.001


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def other_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.01


def other_residual(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0.999)


def skipped_rope(model: Any) -> None:
    """Of one layer, as some families have it."""
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def without(*args: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return forward(*args, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

    attention.forward = without


@pytest.mark.parametrize(
    "change", [other_eps, other_theta, other_activation, other_scale, other_residual, skipped_rope]
)
def test_code_that_does_what_its_config_does_not_say_is_refused(change: Callable[[Any], None]) -> None:
    model = stranger("llama", hidden_act="gelu_pytorch_tanh")
    change(model)
    message = r"'stranger' has no policy, and the nearest that is found answers otherwise: its logits are .* off .*give"
    with pytest.raises(UnsupportedModelError, match=message):
        injected(model)


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt", "gptj", "falcon-alibi", "opt-post-norm"])
def test_what_is_not_found_is_refused_by_name(kind: str) -> None:
    fields = {"num_hidden_layers": 3, "max_position_embeddings": 512, **KINDS[kind]}
    with pytest.raises(UnsupportedModelError, match=r"config.json: .*'stranger' has no policy, and .*give one by inj"):
        injected(stranger(str(fields.pop("model_type")), **fields))


def test_the_parameter_that_is_not_understood_is_named() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"none is found: mlp\.experts\.gate_up_proj \[4, 192, 64\] is none"
    ):
        injected(stranger("mixtral", num_local_experts=4))
    model = stranger("llama")
    model.model.layers[1].extra = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 differs from layer 0 in extra\.(weight|bias)"):
        injected(model)


def test_flat_logits_prove_nothing() -> None:
    model = stranger("llama", tie_word_embeddings=False)
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(UnsupportedModelError, match="its logits do not vary, so that nothing would be proven"):
        injected(model)


def test_a_forward_that_takes_no_tokens_is_refused() -> None:
    model = random_model()
    model.forward = lambda x: model.model(x)  # hidden states  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedModelError, match=r"InternLm2 answers no logits \[rows, tokens, 512\]"):
        injected(model)
    model.forward = lambda x, y: x  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UnsupportedModelError, match=r"its own forward takes no rows of tokens: .*missing 1 req"):
        injected(model)


def test_nothing_is_served_beyond_a_window_that_no_row_reached() -> None:
    model = stranger("mistral", sliding_window=600)
    policy = detected(model, model.config.to_dict(), 2048)
    assert policy.architecture(model.config.to_dict()).max_context == 600
    reached = stranger("mistral", sliding_window=300)
    architecture = detected(reached, reached.config.to_dict(), 2048).architecture(reached.config.to_dict())
    assert (architecture.max_context, architecture.sliding_window) == (2048, (300, 300))


def test_a_model_on_the_meta_device_cannot_be_asked() -> None:
    model = stranger("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match=r"'stranger' is none of .*; its weights are on the meta device"):
        injected(model)
