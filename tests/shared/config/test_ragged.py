"""The ragged engine's options and those of its modules: every field, alias and default, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shared.config import (
    KvCacheConfig,
    MemoryConfig,
    RaggedEngineConfig,
    RaggedQuantizationConfig,
    RaggedTensorParallelConfig,
    StateManagerConfig,
)
from shared.config.modules import (
    EmbeddingsConfig,
    LinearConfig,
    MoeModuleConfig,
    NormConfig,
    RotateHalfConfig,
    SelfAttentionConfig,
    UnembedConfig,
)
from shared.config.options import Options

# what a class asks for; its other fields have defaults
REQUIRED: dict[type[Options], dict[str, Any]] = {
    KvCacheConfig: {"cache_shape": (4, 2, 64)},
    SelfAttentionConfig: {"max_tokens": 8, "n_heads_q": 4, "n_heads_kv": 2, "head_size": 64, "max_sequences": 2},
    LinearConfig: {"max_tokens": 8, "in_channels": 16, "out_channels": 32},
    NormConfig: {"max_tokens": 8, "type": "rms_norm", "channels": 16},
    MoeModuleConfig: {"max_tokens": 8, "model_dim": 16, "intermediate_features": 32, "n_experts": 4},
    EmbeddingsConfig: {"max_tokens": 8, "embedding_dim": 16},
    UnembedConfig: {"max_tokens": 8, "model_dim": 16, "max_sequences": 2, "vocab_size": 100},
}
DEFAULTS: dict[type[Options], dict[str, Any]] = {
    RaggedEngineConfig: {
        "tensor_parallel": RaggedTensorParallelConfig(),
        "state_manager": StateManagerConfig(),
        "quantization": RaggedQuantizationConfig(),
    },
    RaggedTensorParallelConfig: {"tp_size": 1},
    RaggedQuantizationConfig: {"quantization_mode": None},
    StateManagerConfig: {
        "max_tracked_sequences": 2048,
        "max_ragged_batch_size": 768,
        "max_ragged_sequence_count": 512,
        "max_context": 8192,
        "memory_config": MemoryConfig(),
        "offload": False,
    },
    MemoryConfig: {"mode": "reserve", "size": 1_000_000_000},
    KvCacheConfig: {
        "type": "dense",
        "block_size": 128,
        "num_allocation_groups": 1,
        "cache_dtype": "float16",
        "max_blocks_per_allocation_group": 64,
    },
    RotateHalfConfig: {"use_trained_freqs": False, "theta_base": 10_000.0, "rotate_dim": None},
    SelfAttentionConfig: {
        "scale_factor": 1.0,
        "input_dtype": "float16",
        "output_dtype": "float16",
        "masking_type": "causal",
        "masking_args": {},
        "positional_embedding_type": "none",
        "positional_embedding_config": None,
    },
    LinearConfig: {"activation": "identity", "input_dtype": "float16", "output_dtype": "float16"},
    NormConfig: {"residual_dtype": "float16", "input_dtype": "float16", "output_dtype": "float16", "eps": 1e-5},
    MoeModuleConfig: {
        "top_k": 1,
        "input_dtype": "float16",
        "output_dtype": "float16",
        "activation": "identity",
        "normalize_scores": False,
    },
    EmbeddingsConfig: {
        "residual_dtype": "float16",
        "positional_embedding": False,
        "positional_offset": 0,
        "use_token_type": False,
        "output_normalization": None,
    },
    UnembedConfig: {"dtype": "float16", "norm_type": None},
}


@pytest.mark.parametrize("options", DEFAULTS, ids=lambda options: options.__name__)
def test_every_field_has_its_default(options: type[Options]):
    required = REQUIRED.get(options, {})
    made = options(**required)
    assert {name: getattr(made, name) for name in options.model_fields} == {**required, **DEFAULTS[options]}
    assert {name for name, field in options.model_fields.items() if field.is_required()} == required.keys()
    assert not [name for name, field in options.model_fields.items() if not field.description]
    assert options.model_validate_json(made.model_dump_json()) == made
    for name in required:
        with pytest.raises(ValidationError, match=f"{name}\n.*required"):
            options(**{key: value for key, value in required.items() if key != name})


def test_aliases_auto_and_merging_are_those_of_all_options():
    config = RaggedEngineConfig.of({"manager": {"max_context": 64, "offload": "auto"}}, tp={"tp_size": 2})
    assert config == RaggedEngineConfig(state_manager={"max_context": 64}, tensor_parallel={"tp_size": 2})
    with pytest.raises(ValueError, match="Conflicting argument 'manager' / 'state_manager'"):
        RaggedEngineConfig.of({"manager": {"max_context": 64}}, state_manager={"max_context": 65})


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (RaggedEngineConfig, {"tp": {"tp_grain_size": 64}}, r"tensor_parallel\.tp_grain_size\n.*not permitted"),
        (RaggedEngineConfig, {"tp": {"tp_size": 0}}, r"tensor_parallel\.tp_size\n.*greater than or equal to 1"),
        (
            RaggedEngineConfig,
            {"quantization": {"quantization_mode": "int3"}},
            r"quantization\.quantization_mode\n.*Unsupported quantization mode: int3; wf6af16 is the one there is",
        ),
        (
            StateManagerConfig,
            {"max_tracked_sequences": 511},
            r"max_ragged_sequence_count: 512 exceeds max_tracked_sequences \(511\); lower the one or raise the other",
        ),
        (
            StateManagerConfig,
            {"max_ragged_batch_size": 511},
            r"max_ragged_sequence_count: 512 exceeds max_ragged_batch_size \(511\); lower the one or raise the other",
        ),
        *(
            (StateManagerConfig, {name: 0}, rf"{name}\n.*greater than or equal to 1")
            for name in ("max_tracked_sequences", "max_ragged_batch_size", "max_ragged_sequence_count", "max_context")
        ),
        (StateManagerConfig, {"memory_config": {"mode": "all"}}, r"memory_config\.mode\n.*'reserve' or 'allocate'"),
        (MemoryConfig, {"size": 0}, r"size\n.*greater than or equal to 1"),
        (KvCacheConfig, {"cache_shape": (4, 0, 64)}, r"cache_shape\.1\n.*greater than or equal to 1"),
        (KvCacheConfig, {"cache_shape": (4, 2)}, r"cache_shape\.2\n.*required"),
        (KvCacheConfig, {"cache_shape": (4, 2, 64), "block_size": 24}, "24 is not a power of two; use 16, 32, 64 or"),
        (KvCacheConfig, {"cache_shape": (4, 2, 64), "block_size": 0}, r"block_size\n.*greater than or equal to 1"),
        (KvCacheConfig, {"cache_shape": (4, 2, 64), "type": "sparse"}, r"type\n.*'dense' or 'local'"),
        (
            KvCacheConfig,
            {"cache_shape": (4, 2, 64), "cache_dtype": "fp4"},
            r"cache_dtype\n.*'fp4' is not a valid dtype",
        ),
        (KvCacheConfig, {"cache_shape": (4, 2, 64), "num_allocation_groups": 0}, "num_allocation_groups"),
        (LinearConfig, {**REQUIRED[LinearConfig], "activation": "tanh"}, r"activation\n.*'gelu', 'relu'"),
        (LinearConfig, {**REQUIRED[LinearConfig], "input_dtype": "int8"}, r"input_dtype\n.*'float16', 'bfloat16' or"),
        (RotateHalfConfig, {"rotate_dim": 0}, r"rotate_dim\n.*greater than or equal to 1"),
        (NormConfig, {**REQUIRED[NormConfig], "type": "batch_norm"}, r"type\n.*'layer_norm' or 'rms_norm'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(options: type[Options], values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        options(**values)


@pytest.mark.parametrize(
    ("given_as", "dtype"),
    [("fp16", "float16"), (torch.bfloat16, "bfloat16"), ("float", "float32"), ("int8", "int8"), ("fp8", "fp8")],
)
def test_a_cache_is_of_any_dtype_that_keys_and_values_are_kept_as(given_as: Any, dtype: str):
    assert KvCacheConfig(cache_shape=(4, 2, 64), cache_dtype=given_as).cache_dtype == dtype


def test_activations_by_their_names_in_any_case():
    for name in ("GELU", "RELU", "SILU", "GEGLU", "ReGLU", "SiGLU", "IDENTITY"):
        assert LinearConfig(**REQUIRED[LinearConfig], activation=name).activation == name.lower()
