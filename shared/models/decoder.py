"""The one decoder: every family is a run of it over another architecture record.

Each op gives a row the same bits whatever rows are beside it, so logits do not depend on how prompts are batched,
chunked or cached.
"""

import torch
from torch import Tensor

from kernels.activation import gated_gelu_tanh, gated_silu
from kernels.attention import paged_attention
from kernels.linear import linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_and_cache
from shared.batch import RaggedBatch
from shared.checkpoint import Checkpoint
from shared.kv_cache import KvCache
from shared.models.architecture import Architecture
from shared.models.rope import cos_sin_table
from shared.models.weights import LayerWeights, load_weights

_ACTIVATIONS = {"silu": gated_silu, "gelu_tanh": gated_gelu_tanh}


class Decoder:
    """A loaded model. Not for two threads at once."""

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Loads and packs the weights; the checkpoint is not needed afterwards.

        Raises CheckpointError if its parameters do not fit the architecture.
        """
        self.architecture = architecture
        self.dtype = dtype
        self._weights = load_weights(architecture, checkpoint, dtype=dtype, device=device)
        table = cos_sin_table(architecture.rope, architecture.head_dim, architecture.max_context)
        self._cos_sin = table.to(device)
        self._activation = _ACTIVATIONS[architecture.activation]

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, kv: KvCache) -> Tensor:
        """Writes the tokens' keys and values into the cache; float32 logits [len(batch.logit_rows), vocab].

        A position must lie below the architecture's max_context.
        """
        weights, eps = self._weights, self.architecture.norm_eps
        residual = weights.embedding[batch.token_ids]  # [tokens, hidden]
        x = rms_norm(residual, weights.layers[0].input_norm, eps)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            x = self._attention(x, layer, index, batch, kv)
            if index == last:  # what follows is row by row, and only these rows are read
                if not batch.logit_rows.numel():
                    return torch.empty(0, self.architecture.vocab_size)
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
            x, residual = add_rms_norm(linear(x, layer.output), residual, layer.mlp_norm, eps)
            x = linear(self._activation(linear(x, layer.gate_up)), layer.down)
            next_norm = weights.final_norm if index == last else weights.layers[index + 1].input_norm
            x, residual = add_rms_norm(x, residual, next_norm, eps)
        return linear(x, weights.lm_head).to(torch.float32)

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, batch: RaggedBatch, kv: KvCache) -> Tensor:
        """Normed hidden states [tokens, hidden] → attended values [tokens, heads * head_dim]."""
        a = self.architecture
        keys, values = kv.layer(index)
        q = rope_and_cache(
            linear(x, layer.qkv),
            self._cos_sin,
            batch.positions,
            batch.slots,
            keys,
            values,
            a.num_heads,
            a.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            a.norm_eps,
        )
        return paged_attention(
            q,
            keys,
            values,
            batch.cu_seqlens,
            batch.context_lens,
            batch.block_tables,
            a.attention_scale,
            a.sliding_window[index],
        )

    def close(self) -> None:
        """Lets go of the weights."""
        del self._weights, self._cos_sin
