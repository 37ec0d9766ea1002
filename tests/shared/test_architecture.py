"""Policies against the values transformers gives the same config."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.models.architecture import QkNorm
from shared.models.rope import cos_sin_table, inverse_frequencies
from shared.policies.policy import UnsupportedModelError
from shared.policies.table import POLICIES, architecture_of
from tests.tiny_models import KINDS, tiny_model

BASE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 123_456.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn-detailed": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
    },
    "yarn-given-attention": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 1024,
    },
}


# the fields of all others are compared by what they compute: test_families.py
LIKE_LLAMA = [kind for kind in KINDS if kind.partition("-")[0] in ("llama", "mistral", "qwen2", "qwen3")]


@pytest.mark.parametrize("kind", LIKE_LLAMA)
def test_record_is_what_transformers_reads(kind: str) -> None:
    config = json.loads((tiny_model(kind) / "config.json").read_text())
    ours, theirs = architecture_of(config), AutoConfig.from_pretrained(tiny_model(kind))
    assert ours.family == theirs.model_type == kind.partition("-")[0]
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (384, 64, 96)
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads) == (3, 4, 2)
    assert ours.head_dim == (24 if kind == "qwen3" else 16)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_context == theirs.max_position_embeddings
    per_head = QkNorm("rms", bias=False, per_head=True, shared=True)
    assert ours.qk_norm == (per_head if ours.family == "qwen3" else None)
    assert ours.qkv_bias == (ours.family == "qwen2" or kind == "llama-untied-biased")
    assert ours.output_bias == ours.mlp_bias == (kind == "llama-untied-biased")


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_frequencies_equal_transformers(name: str, family: str) -> None:
    parameters = ROPES[name]
    rope = architecture_of({**BASE, "model_type": family, "head_dim": 64, "rope_parameters": parameters}).ropes[0]
    config = AutoConfig.for_model(family, **BASE, head_dim=64, rope_parameters=dict(parameters))
    if rope.kind == "default":
        expected, factor = 1.0 / (rope.theta ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config)
    assert torch.equal(inverse_frequencies(rope), expected)
    assert rope.attention_factor == factor
    angles = torch.arange(100)[:, None].float() * expected
    table = cos_sin_table(rope, 100)
    assert torch.equal(table, torch.cat((angles.cos(), angles.sin()), -1) * factor)


def test_rope_as_transformers_4_wrote_it() -> None:
    old = {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500_000.0}}
    assert architecture_of({**BASE, "model_type": "llama", **old}) == architecture_of(
        {**BASE, "model_type": "llama", **new}
    )


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 100}, (None,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 100}, (100,) * 4),
        ({"model_type": "qwen2", "sliding_window": 100}, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100}, (None,) * 4),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3},
            (None, None, None, 100),
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 100,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (100, None, 100, None),
        ),
    ],
)
def test_sliding_windows(fields: dict[str, object], windows: tuple[int | None, ...]) -> None:
    assert architecture_of({**BASE, **fields}).sliding_window == windows


# Transformers clears a window unless use_sliding_window is set, and keeps old fields in new places.
EXCEPTIONS = {
    *((family, "sliding_window") for family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")),
    ("bloom", "seq_length"),
    ("phi", "partial_rotary_factor"),
    ("stablelm", "partial_rotary_factor"),
    ("gpt_neox", "rotary_pct"),
    ("distilbert", "layer_norm_eps"),
    ("opt", "layer_norm_eps"),
}


def test_family_defaults_are_those_of_transformers() -> None:
    """A field that config.json leaves out means what the family's config class says."""
    for family, policy in POLICIES.items():
        if family in ("qwen", "megatron_gpt_moe") or policy.kind == "encoder":
            continue  # transformers has no class for the two; test_encoders.py holds the others
        theirs = AutoConfig.for_model(family)
        for field, value in policy.defaults.items():
            if (family, field) in EXCEPTIONS:
                continue
            assert getattr(theirs, field) == value, (family, field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 20}, "head_dim"),
        ({"hidden_size": "512"}, "hidden_size"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"vocab_size": None}, "vocab_size"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling.short_factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}},
            "rope_parameters",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["linear_attention"] * 4},
            "layer_types",
        ),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_unsupported_field_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        architecture_of({**BASE, "model_type": "llama", **fields})
    assert raised.value.field == field
    assert str(raised.value).startswith(f"config.json: {field}: ")


def test_a_family_is_a_table() -> None:
    """Its file defines no class, and functions only for what of the record a table cannot say."""
    folder = Path(__file__).parents[2] / "shared" / "policies"
    machinery = {"__init__", "policy", "table", "names", "fields", "positions", "detect", "injected"}
    for path in folder.glob("*.py"):
        if path.stem in machinery:
            continue
        for node in ast.parse(path.read_text()).body:
            assert not isinstance(node, ast.ClassDef), path
            if isinstance(node, ast.FunctionDef):
                assert len(node.body) < 20, (path, node.name)


def test_longrope_serves_what_its_short_factors_do() -> None:
    parameters = {"rope_type": "longrope", "short_factor": [1.5] * 32, "long_factor": [9.0] * 32}
    config = {**BASE, "model_type": "phi3", "original_max_position_embeddings": 1024, "rope_parameters": parameters}
    architecture = architecture_of({**config, "rms_norm_eps": 1e-5})
    assert architecture.max_context == 1024, "of a config's 8192"


def test_bloom_as_its_first_configs_have_it() -> None:
    old = {"model_type": "bloom", "n_embed": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 384}
    new = {"model_type": "bloom", "hidden_size": 96, "n_layer": 3, "n_head": 6, "vocab_size": 384}
    assert architecture_of(old) == architecture_of(new)
    with pytest.raises(UnsupportedModelError, match=r"config\.json: n_head: wants a whole number, has None"):
        architecture_of({**new, "n_head": None})
