"""The one encoder: whole sequences at once, no cache. BERT and its like, and the two towers of CLIP.

It runs the same layers as the decoder (transformer.py), over attention in which a token sees all of its sequence, or,
in CLIP's text tower, those before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.add import add
from kernels.attention import paged_attention
from kernels.gather import gather
from kernels.kv_format import KvPlanes
from shared.models.architecture import Architecture
from shared.models.embedding import embedded
from shared.models.ranks import Ranks
from shared.models.transformer import Take, Transformer
from shared.models.weights import LayerWeights, ModelWeights
from shared.workspace import Workspace


class Encoder:
    """A loaded model. Not for two threads at once."""

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        *,
        deterministic: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """It computes in the weights' dtype, where they lie. ranks: as a Decoder's."""
        self.architecture = architecture
        self._own, self._ranks = ranks.own if ranks else architecture, ranks
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self._weights = weights
        self._layers = Transformer(architecture, weights, deterministic=deterministic, ranks=ranks)
        self._workspace = Workspace(self.device)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        token_types: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        context_lens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Hidden states [tokens, hidden] of sequences that lie back to back.

        token_ids, token_types int64 [tokens] (types default to 0); cu_seqlens int32 [seqs + 1], where each begins.
        positions int32 [tokens], default: from the beginning of each sequence. context_lens int32 [seqs]: so many of
        the first tokens are all that the others see, where attention is not causal; default: all. max_seqlen: length
        of the longest; without it, it is waited for. Raises IndexError for a token, a type or a position that the
        model does not have. The next call does not overwrite the result.
        """
        a, weights, take = self.architecture, self._weights, Take(self._workspace, self.dtype)
        if positions is None:
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(token_ids))
            positions = torch.arange(len(token_ids), dtype=torch.int32, device=token_ids.device) - starts
        if weights.token_types is not None and token_types is None:
            token_types = torch.zeros_like(token_ids)
        stream = embedded(
            weights,
            token_ids,
            scale=a.embedding_scale,
            positions=None if weights.positions is None else positions.int(),
            offset=a.position_offset,
            token_types=token_types if weights.token_types is not None else None,
            ranks=self._ranks,
            take=take,
        )
        return self._through_layers(stream, cu_seqlens, context_lens, max_seqlen, take)

    @torch.inference_mode()
    def forward_images(self, pixels: Tensor) -> Tensor:
        """Hidden states [images, 1 + patches, hidden] of images [images, channels, height, width]."""
        a, weights, take = self.architecture, self._weights, Take(self._workspace, self.dtype)
        assert a.patches
        assert weights.patches
        assert weights.positions is not None
        images, size, count = len(pixels), a.patches.size, a.patches.count
        cut = pixels.to(self.dtype).unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        patches = cut.reshape(images * count, a.patches.values)
        projected = self._layers.linear(patches, weights.patches, take("patches", len(patches), a.hidden_size))
        tokens = take("stream", images * (1 + count), a.hidden_size)
        by_image = tokens.view(images, 1 + count, a.hidden_size)
        by_image[:, 0] = weights.embedding[0]
        by_image[:, 1:] = projected.view(images, count, a.hidden_size)
        position = torch.arange(1 + count, device=self.device).repeat(images)
        add(gather(weights.positions, position, out=take.like("positions", tokens)), tokens, out=tokens)
        cu_seqlens = torch.arange(0, len(tokens) + 1, 1 + count, dtype=torch.int32, device=self.device)
        return self._through_layers(tokens, cu_seqlens, None, 1 + count, take).view_as(by_image)

    def _through_layers(
        self, stream: Tensor, cu_seqlens: Tensor, context_lens: Tensor | None, max_seqlen: int | None, take: Take
    ) -> Tensor:
        """The same from embeddings [tokens, hidden] on, which are overwritten."""
        a = self._own
        if self._weights.embedding_norm is not None:
            stream = self._layers.norm(stream, self._weights.embedding_norm, take.like("normed_stream", stream))
        if context_lens is None:
            context_lens = cu_seqlens.diff()
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        # each token is a block of its own, and its keys and values lie where the projection wrote them
        tables = cu_seqlens[:-1, None] + torch.arange(max(max_seqlen, 1), dtype=torch.int32, device=self.device)

        def attend(index: int, x: Tensor, layer: LayerWeights) -> Tensor:
            rows = x.shape[0]
            qkv = self._layers.linear(x, layer.qkv, take("qkv", rows, a.qkv_size))
            q, k, v = qkv.split([heads * a.head_dim for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads)], 1)
            k, v = (part.unflatten(1, (a.num_kv_heads, 1, a.head_dim)) for part in (k, v))
            return paged_attention(
                take("q", rows, q.shape[1]).copy_(q).view(rows, a.num_heads, a.head_dim),
                KvPlanes(k, v),
                cu_seqlens,
                context_lens,
                tables,
                a.attention_scale,
                causal=a.causal,
                out=take("attended", rows, a.num_heads * a.head_dim),
            )

        return self._layers.forward(stream, attend, take).clone()

    @property
    def workspace_bytes(self) -> int:
        """Of activations, which all layers share."""
        return self._workspace.num_bytes

    def close(self) -> None:
        """Lets go of the weights."""
        del self._weights, self._layers, self._workspace
