"""Modules by name: DeepSpeed's names, its errors, and classes of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantization import Quantization
from shared.config import RaggedEngineConfig
from shared.config.modules import (
    EmbeddingsConfig,
    LinearConfig,
    ModuleConfig,
    MoeModuleConfig,
    NormConfig,
    SelfAttentionConfig,
    UnembedConfig,
)
from shared.engine.modules import (
    ConfigBundle,
    Embedding,
    Linear,
    Module,
    Moe,
    PostNorm,
    PreNorm,
    SelfAttention,
    Unembed,
    instantiate_config,
    instantiate_linear,
    register_module,
    registry,
)

ATTENTION = SelfAttentionConfig(max_tokens=8, n_heads_q=4, n_heads_kv=2, head_size=8, max_sequences=2)
LINEAR = LinearConfig(max_tokens=8, in_channels=64, out_channels=32)
LAYER, RMS = (NormConfig.of(max_tokens=8, type=kind, channels=8) for kind in ("layer_norm", "rms_norm"))
MOE = MoeModuleConfig(max_tokens=8, model_dim=8, intermediate_features=8, n_experts=2)
EMBED = EmbeddingsConfig(max_tokens=8, embedding_dim=8)
UNEMBED = UnembedConfig(max_tokens=8, model_dim=8, max_sequences=2, vocab_size=9)


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("dense_blocked_attention", ATTENTION, SelfAttention),
        ("ragged_embedding", EMBED, Embedding),
        ("blas_fp_linear", LINEAR, Linear),
        ("quantized_wf6af16_linear", LINEAR, Linear),
        ("cutlass_multi_gemm_moe", MOE, Moe),
        ("cuda_pre_ln", LAYER, PreNorm),
        ("cuda_pre_rms", RMS, PreNorm),
        ("cuda_post_ln", LAYER, PostNorm),
        ("cuda_post_rms", RMS, PostNorm),
        ("ragged_unembed", UNEMBED, Unembed),
    ],
)
def test_every_name_makes_its_class(name: str, config: ModuleConfig, kind: type[Module]) -> None:
    module = instantiate_config(ConfigBundle(name, config))
    assert type(module) is kind
    assert module.config is config


def test_errors_are_of_the_kinds_that_deepspeed_raises() -> None:
    with pytest.raises(KeyError, match="unknown module cutlass_fp_linear: it is none of dense_blocked_attention, "):
        instantiate_config(ConfigBundle("cutlass_fp_linear", LINEAR))
    with pytest.raises(ValueError, match="cuda_pre_ln does not support this config: type: rms_norm, and it is for lay"):
        instantiate_config(ConfigBundle("cuda_pre_ln", RMS))
    wide = LinearConfig(**LINEAR.model_dump() | {"input_dtype": "float32", "output_dtype": "float32"})
    with pytest.raises(ValueError, match=r"quantized_wf6af16_linear .* input_dtype: float32, and it is for float16"):
        instantiate_config(ConfigBundle("quantized_wf6af16_linear", wide))
    mixed = LinearConfig(**LINEAR.model_dump() | {"output_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="blas_fp_linear does not support this config: output_dtype: bfloat16 from"):
        instantiate_config(ConfigBundle("blas_fp_linear", mixed))
    with pytest.raises(TypeError, match="blas_fp_linear wants a LinearConfig, has a NormConfig"):
        instantiate_config(ConfigBundle("blas_fp_linear", RMS))
    not_a_module: Any = int
    with pytest.raises(TypeError, match=r"'int'> is no subclass of shared.engine.modules.module.Module"):
        register_module(not_a_module)


def test_what_a_class_is_told_besides_its_config() -> None:
    int4 = Quantization(4, 32, symmetric=False)
    module = instantiate_config(ConfigBundle("blas_fp_linear", LINEAR, {"quantization": int4}))
    assert isinstance(module, Linear)
    assert module.transform_param(torch.randn(32, 64)).quantization == int4
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_dtype'"):
        instantiate_config(ConfigBundle("blas_fp_linear", LINEAR, {"weight_dtype": "int8"}))


def test_the_engines_config_chooses_the_linear() -> None:
    plain = instantiate_linear(LINEAR)
    quantized = instantiate_linear(LINEAR, RaggedEngineConfig(quantization={"quantization_mode": "wf6af16"}))
    assert plain.quantization is None
    assert quantized.quantization == Quantization(6, floating=True)
    assert instantiate_linear(LINEAR, RaggedEngineConfig()).config is LINEAR


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))

    @register_module
    class Doubled(Module[LinearConfig]):
        name = "doubled"
        config_class = LinearConfig

        @classmethod
        def objection(cls, config: LinearConfig) -> str | None:
            return "activation: this has none" if config.activation != "identity" else None

        def __call__(self, x: Tensor) -> Tensor:
            return 2 * x

    assert torch.equal(instantiate_config(ConfigBundle("doubled", LINEAR))(torch.ones(2)), torch.full((2,), 2.0))
    gelu = LinearConfig(**LINEAR.model_dump() | {"activation": "gelu"})
    with pytest.raises(ValueError, match="doubled does not support this config: activation: this has none"):
        instantiate_config(ConfigBundle("doubled", gelu))
    with pytest.raises(ValueError, match="name: doubled is Doubled's; give the class one of its own"):
        register_module(Doubled)
