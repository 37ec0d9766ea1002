"""The modules on Triton's kernels: a layer of them against what C computes of the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantization import Quantization
from shared.batch import BatchEntry, build_batch
from shared.config import KvCacheConfig
from shared.config.modules import (
    EmbeddingsConfig,
    LinearConfig,
    MoeModuleConfig,
    NormConfig,
    RotateHalfConfig,
    SelfAttentionConfig,
    UnembedConfig,
)
from shared.engine.modules import (
    ConfigBundle,
    Embedding,
    KvGroups,
    Linear,
    Moe,
    PostNorm,
    PreNorm,
    SelfAttention,
    Unembed,
    instantiate_config,
)
from tests.shared.engine.modules.references import assert_near

WIDTH, DTYPE = 64, "bfloat16"
SAME: dict[str, Any] = {"max_tokens": 8, "input_dtype": DTYPE, "output_dtype": DTYPE}


def layer(device: str = "cpu") -> Tensor:
    """Logits of two sequences, float32."""
    torch.manual_seed(0)
    batch = build_batch([BatchEntry([3, 1, 4], 0, [1]), BatchEntry([5], 0, [2])], 16).to(device)
    embed = Embedding(EmbeddingsConfig.of(max_tokens=8, residual_dtype=DTYPE, embedding_dim=WIDTH), device=device)
    pre = PreNorm(NormConfig.of(type="rms_norm", channels=WIDTH, residual_dtype=DTYPE, **SAME), device=device)
    post = PostNorm(NormConfig.of(type="layer_norm", channels=WIDTH, residual_dtype=DTYPE, **SAME), device=device)
    qkv = Linear(LinearConfig(in_channels=WIDTH, out_channels=2 * WIDTH, **SAME), device=device)
    attend = SelfAttention(
        SelfAttentionConfig(
            n_heads_q=4,
            n_heads_kv=2,
            head_size=16,
            max_sequences=2,
            scale_factor=0.25,
            positional_embedding_type="rotate_half",
            positional_embedding_config=RotateHalfConfig(rotate_dim=8),
            **SAME,
        ),
        device=device,
    )
    experts = Moe(
        MoeModuleConfig(model_dim=WIDTH, intermediate_features=32, n_experts=3, top_k=2, activation="siglu", **SAME),
        device=device,
    )
    unembed = Unembed(
        UnembedConfig.of(
            max_tokens=8, dtype=DTYPE, norm_type="rms_norm", model_dim=WIDTH, max_sequences=2, vocab_size=9
        ),
        device=device,
    )
    kv = KvGroups(KvCacheConfig.of(cache_shape=(1, 2, 16), block_size=16, cache_dtype=DTYPE), 3, device=device)
    gamma, beta = pre.transform_param(torch.rand(WIDTH) + 0.5), pre.transform_param(torch.randn(WIDTH))
    residual = embed(batch, embed.transform_param(torch.randn(9, WIDTH)))
    residual, hidden = pre(residual, None, gamma)
    attended = attend(qkv(hidden, qkv.transform_param(torch.randn(2 * WIDTH, WIDTH) / 8)), kv.layer(0), batch)
    residual, hidden = post(residual, attended, gamma, beta)
    parts = torch.randn(3, 64, WIDTH) / 8, torch.randn(3, WIDTH, 32) / 8
    y = experts(
        hidden,
        experts.transform_gate_param(torch.randn(3, WIDTH)),
        experts.transform_moe_mlp_1_param(parts[0]),
        experts.transform_moe_mlp_2_param(parts[1]),
    )
    residual, _ = pre(residual, y, gamma)
    head, logits = unembed.transform_param(torch.randn(9, WIDTH) / 8), torch.empty(2, 9, device=device)
    return unembed(residual, head, batch, gamma=gamma, out=logits)


def test_a_layer_is_what_it_is_in_c(request: pytest.FixtureRequest) -> None:
    expected = layer()
    request.getfixturevalue("interpreter")
    torch.testing.assert_close(layer(), expected, rtol=0.03, atol=0.03)


@pytest.mark.gpu
def test_a_layer_on_a_gpu_is_what_it_is_in_c() -> None:
    torch.testing.assert_close(layer("cuda").cpu(), layer(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("activation", ["identity", "geglu"])
def test_fp6_weights_beside_float16_activations(interpreter: None, activation: str) -> None:
    config = LinearConfig.of(max_tokens=8, in_channels=40, out_channels=24, activation=activation)
    module = instantiate_config(ConfigBundle("quantized_wf6af16_linear", config))
    assert isinstance(module, Linear)
    packed = module.transform_param(torch.randn(24 * (1 + (activation == "geglu")), 40) / 6)
    assert packed.quantization == Quantization(6, floating=True)
    x = torch.randn(5, 40).half()
    y = x.double() @ packed.dequantize().double().T
    if activation == "geglu":
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert_near(module(x, packed), y, "float16")
