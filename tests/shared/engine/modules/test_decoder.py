"""Decoders made of the modules, against the engine's own on the same weights: the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.add import add
from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, RaggedBatch, build_batch
from shared.checkpoint import open_checkpoint
from shared.config import KvCacheConfig
from shared.config.modules import (
    Activation,
    EmbeddingsConfig,
    LinearConfig,
    MoeModuleConfig,
    NormConfig,
    RotateHalfConfig,
    SelfAttentionConfig,
    UnembedConfig,
)
from shared.engine.modules import Embedding, KvGroups, Linear, Moe, PreNorm, SelfAttention, Unembed
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights
from shared.models.architecture import Architecture
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.models.weights import LayerWeights, ModelWeights
from shared.models.weights import Norm as NormWeights
from shared.policies.table import architecture_of
from tests.tiny_models import tiny_model

BLOCK_TOKENS, NUM_BLOCKS, MAX_TOKENS, MAX_SEQUENCES = 16, 24, 96, 3
ACTIVATIONS: dict[tuple[bool, str], Activation] = {
    (True, "silu"): "siglu",
    (True, "gelu_tanh"): "geglu",
    (False, "gelu_tanh"): "gelu",
    (False, "relu"): "relu",
}


class Model:
    """What a program makes of the modules: norms before the sub-layers, one after the other."""

    def __init__(self, a: Architecture, weights: ModelWeights, dtype: str) -> None:
        norm = "rms_norm" if a.norm == "rms" else "layer_norm"
        self.weights, self.layers = weights, weights.layers
        self.embed = Embedding(
            EmbeddingsConfig(
                max_tokens=MAX_TOKENS,
                residual_dtype=dtype,
                embedding_dim=a.hidden_size,
                positional_embedding=a.num_positions > 0,
                positional_offset=a.position_offset,
                output_normalization=norm if a.embedding_norm else None,
            ),
            eps=a.norm_eps,
        )
        same = {"residual_dtype": dtype, "input_dtype": dtype, "output_dtype": dtype}
        self.norm = PreNorm(
            NormConfig(max_tokens=MAX_TOKENS, type=norm, channels=a.hidden_size, eps=a.norm_eps, **same)
        )
        self.qkv = linear(a.hidden_size, a.qkv_size, dtype)
        self.attend = SelfAttention(attention_config(a, dtype))
        self.project = linear(a.num_heads * a.head_dim, a.hidden_size, dtype)
        activation = ACTIVATIONS[a.gated, a.activation]
        if a.experts:
            self.moe = Moe(
                MoeModuleConfig(
                    max_tokens=MAX_TOKENS,
                    model_dim=a.hidden_size,
                    intermediate_features=a.experts.intermediate_size,
                    n_experts=a.experts.counts[0],
                    top_k=a.experts.per_token,
                    input_dtype=dtype,
                    output_dtype=dtype,
                    activation=activation,
                    normalize_scores=a.experts.renormalize,
                )
            )
        self.mlp_1 = linear(a.hidden_size, a.intermediate_size, dtype, activation)
        self.mlp_2 = linear(a.intermediate_size, a.hidden_size, dtype)
        self.unembed = Unembed(
            UnembedConfig(
                max_tokens=MAX_TOKENS,
                dtype=dtype,
                norm_type=norm,
                model_dim=a.hidden_size,
                max_sequences=MAX_SEQUENCES,
                vocab_size=a.vocab_size,
            ),
            eps=a.norm_eps,
        )
        self.vocab_size = a.vocab_size

    def forward(self, batch: RaggedBatch, kv: KvGroups) -> Tensor:
        weights = self.weights
        residual = self.embed(batch, weights.embedding, weights.positions, **affine(weights.embedding_norm))
        hidden: Tensor | None = None
        for index, layer in enumerate(self.layers):
            residual, hidden = self.norm(residual, hidden, **affine(layer.attention_norm))
            attended = self.attend(self.qkv(hidden, layer.qkv), kv.layer(index), batch)
            residual, hidden = self.norm(residual, self.project(attended, layer.output), **affine(layer.mlp_norm))
            hidden = self.mlp(hidden, layer)
        assert hidden is not None
        assert weights.lm_head is not None
        add(hidden, residual, out=residual)
        logits = torch.empty(len(batch.logit_rows), self.vocab_size)
        return self.unembed(residual, weights.lm_head, batch, out=logits, **affine(weights.final_norm))

    def mlp(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        if layer.router and layer.experts_up and layer.experts_down:
            return self.moe(hidden, layer.router, layer.experts_up, layer.experts_down)
        assert layer.up
        assert layer.down
        return self.mlp_2(self.mlp_1(hidden, layer.up), layer.down)


def linear(inputs: int, outputs: int, dtype: str, activation: Activation = "identity") -> Linear:
    return Linear(
        LinearConfig(
            max_tokens=MAX_TOKENS,
            in_channels=inputs,
            out_channels=outputs,
            activation=activation,
            input_dtype=dtype,
            output_dtype=dtype,
        )
    )


def attention_config(a: Architecture, dtype: str) -> SelfAttentionConfig:
    rope, window = a.ropes[0], a.sliding_window[0]
    positions = "alibi" if a.alibi_slopes else "none" if rope is None else "rotate_half"
    return SelfAttentionConfig(
        max_tokens=MAX_TOKENS,
        n_heads_q=a.num_heads,
        n_heads_kv=a.num_kv_heads,
        head_size=a.head_dim,
        max_sequences=MAX_SEQUENCES,
        scale_factor=a.attention_scale,
        input_dtype=dtype,
        output_dtype=dtype,
        masking_type="causal" if window is None else "local",
        masking_args={} if window is None else {"window": window},
        positional_embedding_type=positions,
        positional_embedding_config=RotateHalfConfig(theta_base=rope.theta, rotate_dim=rope.dim) if rope else None,
    )


def affine(norm: NormWeights | None) -> dict[str, Tensor | None]:
    return {} if norm is None else {"gamma": norm.weight, "beta": norm.bias}


def steps(vocab_size: int) -> Sequence[Sequence[BatchEntry]]:
    """A prompt and the beginning of a longer one; the rest of it beside a decode step; two decode steps."""
    torch.manual_seed(0)
    one, other = (torch.randint(3, vocab_size, (length,)).tolist() for length in (19, 70))
    table, other_table = [7, 2], [5, 11, 1, 9, 3]
    return (
        [BatchEntry(one[:17], 0, table), BatchEntry(other[:33], 0, other_table, "none")],
        [BatchEntry(one[17:18], 17, table), BatchEntry(other[33:69], 33, other_table)],
        [BatchEntry(one[18:], 18, table), BatchEntry(other[69:], 69, other_table)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased", "mistral", "mixtral", "gpt2", "opt", "bloom"])
def test_a_decoder_of_modules_has_the_bits_of_the_engine(kind: str, dtype: str) -> None:
    folder = tiny_model(kind)
    files = ModelFiles(kind, folder, find_weights(folder), "")
    a = architecture_of(files.config)
    weights = load_weights(a, open_checkpoint(files), dtype=DTYPES[dtype], device="cpu")
    decoder, model = Decoder(a, weights), Model(a, weights, dtype)
    kv = KvCache(KvLayout.of(a, "", dtype, BLOCK_TOKENS), NUM_BLOCKS)
    shape = (a.num_layers, a.num_kv_heads, a.head_dim)
    groups = KvGroups(KvCacheConfig(cache_shape=shape, block_size=BLOCK_TOKENS, cache_dtype=dtype), NUM_BLOCKS)
    for entries in steps(a.vocab_size):
        batch = build_batch(entries, BLOCK_TOKENS)
        expected = decoder.forward(batch, kv)
        assert expected.isfinite().all()
        assert torch.equal(model.forward(batch, groups), expected)
    assert torch.equal(groups.caches[0].pool, kv.pool)
