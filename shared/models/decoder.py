"""The one decoder: every family is a run of it over another architecture record.

Each op gives a row the same bits whatever rows are beside it, so logits do not depend on how prompts are batched,
chunked or cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activation import gated
from kernels.attention import paged_attention
from kernels.gather import gather
from kernels.linear import LinearWeight, linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_and_cache
from shared.batch import RaggedBatch
from shared.kv_cache import KvCache
from shared.models.architecture import Architecture
from shared.models.rope import cos_sin_table
from shared.models.weights import DecoderWeights, LayerWeights
from shared.workspace import Workspace


@dataclass(frozen=True)
class _Take:
    """The model's own dtype for what is taken from a workspace."""

    workspace: Workspace
    dtype: torch.dtype

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        return self.workspace.take(name, rows, width, self.dtype)


class Decoder:
    """A loaded model. Not for two threads at once."""

    def __init__(self, architecture: Architecture, weights: DecoderWeights, *, deterministic: bool = True) -> None:
        """It computes in the weights' dtype, where they lie.

        deterministic: a token's bits are its own, whatever is beside it; on a CPU they always are.
        """
        self.architecture, self._deterministic = architecture, deterministic
        self.dtype, device = weights.embedding.dtype, weights.embedding.device
        self._weights = weights
        table = cos_sin_table(architecture.rope, architecture.head_dim, architecture.max_context)
        self._cos_sin = table.to(device)
        self._workspace = Workspace(device)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, kv: KvCache, workspace: Workspace | None = None) -> Tensor:
        """Writes the tokens' keys and values into the cache; float32 logits [len(batch.logit_rows), vocab].

        With a workspace of the caller's, activations and logits lie there, and the next forward overwrites them. A
        position must lie below the architecture's max_context.
        """
        a, weights, eps = self.architecture, self._weights, self.architecture.norm_eps
        take = _Take(workspace or self._workspace, self.dtype)
        rows = batch.num_tokens
        residual = gather(weights.embedding, batch.token_ids, out=take("residual", rows, a.hidden_size))
        x = rms_norm(residual, weights.layers[0].input_norm, eps, out=take("x", rows, a.hidden_size))
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            attended = self._attention(x, layer, index, batch, kv, take)
            if index == last:  # what follows is row by row, and only these rows are read
                rows = len(batch.logit_rows)
                if not rows:
                    return torch.empty(0, a.vocab_size, device=x.device)
                attended = gather(attended, batch.logit_rows, out=take("wanted", rows, attended.shape[1]))
                residual = gather(residual, batch.logit_rows, out=take("wanted_residual", rows, a.hidden_size))
                x = take("x", rows, a.hidden_size)
            output = take("output", rows, a.hidden_size)
            self._linear(attended, layer.output, output)
            add_rms_norm(output, residual, layer.mlp_norm, eps, out=x, residual_out=residual)
            gate_up = self._linear(x, layer.gate_up, take("gate_up", rows, 2 * a.intermediate_size))
            activated = gated(gate_up, a.activation, out=take("activated", rows, a.intermediate_size))
            self._linear(activated, layer.down, output)
            next_norm = weights.final_norm if index == last else weights.layers[index + 1].input_norm
            add_rms_norm(output, residual, next_norm, eps, out=x, residual_out=residual)
        if workspace is None:
            logits = torch.empty(rows, a.vocab_size, device=x.device)
        else:
            logits = workspace.take("logits", rows, a.vocab_size, torch.float32)
        return self._linear(x, weights.lm_head, logits)

    def _linear(self, x: Tensor, weight: LinearWeight, out: Tensor) -> Tensor:
        return linear(x, weight, out=out, own_bits=self._deterministic)

    def _attention(
        self, x: Tensor, layer: LayerWeights, index: int, batch: RaggedBatch, kv: KvCache, take: _Take
    ) -> Tensor:
        """Normed hidden states [tokens, hidden] → attended values [tokens, heads * head_dim]."""
        a, rows = self.architecture, batch.num_tokens
        cache = kv.layer(index)
        q = rope_and_cache(
            self._linear(x, layer.qkv, take("qkv", rows, a.qkv_size)),
            self._cos_sin,
            batch.positions,
            batch.slots,
            cache,
            a.num_heads,
            a.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            a.norm_eps,
            out=take("q", rows, a.num_heads * a.head_dim).view(rows, a.num_heads, a.head_dim),
        )
        return paged_attention(
            q,
            cache,
            batch.cu_seqlens,
            batch.context_lens,
            batch.block_tables,
            a.attention_scale,
            a.sliding_window[index],
            max_query_len=batch.max_query_len,
            out=take("attended", rows, a.num_heads * a.head_dim),
        )

    def close(self) -> None:
        """Lets go of the weights."""
        del self._weights, self._cos_sin, self._workspace
