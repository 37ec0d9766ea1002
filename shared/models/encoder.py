"""The one encoder: whole sequences at once, no cache. BERT and its like, and the two towers of CLIP.

It runs the same layers as the decoder (transformer.py), over attention in which a token sees all of its sequence, or,
in CLIP's text tower, those before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import dense_attention
from kernels.embedding import embed
from shared.models.architecture import Architecture
from shared.models.transformer import Take, Transformer
from shared.models.weights import LayerWeights, ModelWeights
from shared.workspace import Workspace


class Encoder:
    """A loaded model. Not for two threads at once."""

    def __init__(self, architecture: Architecture, weights: ModelWeights, *, deterministic: bool = True) -> None:
        """It computes in the weights' dtype, where they lie."""
        self.architecture = architecture
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self._weights = weights
        self._layers = Transformer(architecture, weights, deterministic=deterministic)
        self._workspace = Workspace(self.device)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Hidden states [tokens, hidden] of sequences that lie back to back.

        token_ids, token_types int64 [tokens] (types default to 0); cu_seqlens int32 [seqs + 1], where each begins.
        Positions count from the beginning of each sequence. The next call does not overwrite the result.
        """
        a, weights = self.architecture, self._weights
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        positions = torch.arange(len(token_ids), dtype=torch.int32, device=token_ids.device) - starts
        if weights.token_types is not None and token_types is None:
            token_types = torch.zeros_like(token_ids)
        take = Take(self._workspace, self.dtype)
        stream = embed(
            weights.embedding,
            token_ids,
            scale=a.embedding_scale,
            positions=None if weights.positions is None else positions.int(),
            position_table=weights.positions,
            offset=a.position_offset,
            token_types=token_types if weights.token_types is not None else None,
            type_table=weights.token_types,
            out=take("stream", len(token_ids), a.hidden_size),
        )
        return self.layers(stream, cu_seqlens)

    @torch.inference_mode()
    def layers(self, stream: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The same from embeddings [tokens, hidden] on, which are overwritten."""
        a, take = self.architecture, Take(self._workspace, self.dtype)
        if self._weights.embedding_norm is not None:
            stream = self._layers.norm(stream, self._weights.embedding_norm, take.like("normed_stream", stream))

        def attend(index: int, x: Tensor, layer: LayerWeights) -> Tensor:
            rows = x.shape[0]
            qkv = self._layers.linear(x, layer.qkv, take("qkv", rows, a.qkv_size))
            q, k, v = qkv.split([heads * a.head_dim for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads)], 1)
            # what is contiguous attention takes as it is; k and v are views of the fused projection
            queries = take("q", rows, q.shape[1]).copy_(q).view(rows, a.num_heads, a.head_dim)
            return dense_attention(
                queries,
                k.unflatten(1, (a.num_kv_heads, a.head_dim)),
                v.unflatten(1, (a.num_kv_heads, a.head_dim)),
                cu_seqlens,
                cu_seqlens,
                a.attention_scale,
                causal=a.causal,
                out=take("attended", rows, a.num_heads * a.head_dim),
            )

        return self._layers.forward(stream, attend, take).clone()

    @torch.inference_mode()
    def pooled(self, first: Tensor) -> Tensor:
        """BERT's pooler over the hidden states of first tokens [seqs, hidden]: tanh of a linear layer."""
        if self._weights.pooler is None:
            raise ValueError(f"{self.architecture.family}: this model has no pooler")
        return self._layers.linear(first.contiguous(), self._weights.pooler, torch.empty_like(first)).tanh()

    def close(self) -> None:
        """Lets go of the weights."""
        del self._weights, self._layers, self._workspace
