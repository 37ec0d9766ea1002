"""The one decoder: every family of language models is a run of it over another architecture record.

Each op gives a row the same bits whatever rows are beside it, so logits do not depend on how prompts are batched,
chunked or cached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import paged_attention
from kernels.cpu.library import record
from kernels.head_norm import head_norm
from kernels.rope import rope_and_cache
from kernels.scale import scale
from shared.batch import NULL_BLOCK, BatchEntry, RaggedBatch, build_batch
from shared.kv_cache import KvCache
from shared.models.architecture import Architecture
from shared.models.embedding import embedded
from shared.models.expert_ranks import ExpertRanks
from shared.models.ranks import Ranks
from shared.models.rope import cos_sin_table
from shared.models.transformer import Take, Transformer
from shared.models.weights import LayerWeights, ModelWeights, Norm
from shared.workspace import Workspace


class Decoder:
    """A loaded model. Not for two threads at once."""

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        *,
        deterministic: bool = True,
        ranks: Ranks | None = None,
        expert_ranks: ExpertRanks | None = None,
    ) -> None:
        """It computes in the weights' dtype, where they lie.

        deterministic: a token's bits are its own, whatever is beside it; on a CPU they always are.
        ranks: that have the model together: the weights, and the cache of each forward, are this one's part of them,
        and all ranks run the same forwards. architecture is the whole model's. expert_ranks: likewise, of its experts.
        """
        self.architecture = architecture
        # what this process has of the heads
        self._own = ranks.own if ranks else architecture
        self._ranks = ranks
        self.dtype, device = weights.embedding.dtype, weights.embedding.device
        self._weights = weights
        self._layers = Transformer(
            architecture, weights, deterministic=deterministic, ranks=ranks, expert_ranks=expert_ranks
        )
        ropes = dict.fromkeys(architecture.ropes)
        tables = {rope: cos_sin_table(rope, architecture.max_context).to(device) for rope in ropes}
        self._cos_sin = [tables[rope] for rope in architecture.ropes]
        slopes = self._own.alibi_slopes
        self._slopes = torch.tensor(slopes, dtype=torch.float32, device=device) if slopes else None
        # as the model's own code rounds it
        self._embedding_scale = float(torch.tensor(architecture.embedding_scale, dtype=self.dtype))
        self._projections: Tensor | None = None
        if ranks and architecture.qk_norm and not architecture.qk_norm.per_head:
            self._projections = ranks.whole_projections(device)
        self._workspace = Workspace(device)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, kv: KvCache, workspace: Workspace | None = None) -> Tensor:
        """Writes the tokens' keys and values into the cache; float32 logits [len(batch.logit_rows), vocab].

        With a workspace of the caller's, activations and logits lie there, and the next forward overwrites them. A
        position must lie below the architecture's max_context.
        """
        a = self.architecture
        take = Take(workspace or self._workspace, self.dtype)
        stream = self._embedded(batch, take)

        def attend(index: int, x: Tensor, layer: LayerWeights) -> Tensor:
            return self._attention(x, layer, index, batch, kv, take)

        x = self._layers.forward(stream, attend, take, batch.logit_rows)
        rows = len(batch.logit_rows)
        if workspace is None:
            logits = torch.empty(rows, a.vocab_size, device=x.device)
        else:
            logits = workspace.take("logits", rows, a.vocab_size, torch.float32)
        if not rows:
            return logits
        assert self._weights.lm_head is not None
        self._layers.whole_linear(x, self._weights.lm_head, "tokens", take, logits)
        if a.logit_scale != 1.0 or a.logit_cap is not None:
            scale(logits, a.logit_scale, soft_cap=a.logit_cap, out=logits)
        return logits

    def reserve(self, tokens: int, kv: KvCache) -> None:
        """Has a CPU's activations of that many tokens lie ready, without computing anything."""
        length = min(tokens, self.architecture.max_context)
        blocks = [NULL_BLOCK] * -(-length // kv.layout.block_tokens)
        entries = [BatchEntry([0] * length, 0, blocks, "all") for _ in range(-(-tokens // length))]
        with record():  # ops are written down, and do not run
            self.forward(build_batch(entries, kv.layout.block_tokens), kv)

    @property
    def workspace_bytes(self) -> int:
        """Of activations, which all layers share."""
        return self._workspace.num_bytes

    def observe_layers(self, after_layer: Callable[[int], None] | None) -> None:
        """See Transformer.after_layer."""
        self._layers.after_layer = after_layer

    def _embedded(self, batch: RaggedBatch, take: Take) -> Tensor:
        weights = self._weights
        stream = embedded(
            weights,
            batch.token_ids,
            scale=self._embedding_scale,
            positions=None if weights.positions is None else batch.positions,
            offset=self.architecture.position_offset,
            ranks=self._ranks,
            take=take,
        )
        if weights.embedding_norm is None:
            return stream
        return self._layers.norm(stream, weights.embedding_norm, take.like("normed_stream", stream))

    def _attention(
        self, x: Tensor, layer: LayerWeights, index: int, batch: RaggedBatch, kv: KvCache, take: Take
    ) -> Tensor:
        """Normed hidden states [tokens, hidden] → attended values [tokens, heads * head_dim]."""
        a, rows = self._own, batch.num_tokens
        cache = kv.layer(index)
        qkv = self._layers.linear(x, layer.qkv, take("qkv", rows, a.qkv_size))
        if a.qkv_clip is not None:
            scale(qkv, clip=a.qkv_clip, out=qkv)
        # RMSNorm of each head by a weight that all share is the rope op's own
        fused = a.qk_norm is not None and a.qk_norm.per_head and a.qk_norm.shared and a.qk_norm.kind == "rms"
        if self._projections is not None:
            self._norm_projections(qkv, layer, self._projections, take)
        elif not fused:
            self._norm_heads(qkv, layer.q_norm, 0, a.num_heads)
            self._norm_heads(qkv, layer.k_norm, a.num_heads * a.head_dim, a.num_kv_heads)
        rope = a.ropes[index]
        q = rope_and_cache(
            qkv,
            self._cos_sin[index],
            batch.positions,
            batch.slots,
            cache,
            a.num_heads,
            a.num_kv_heads,
            layer.q_norm.weight if fused and layer.q_norm else None,
            layer.k_norm.weight if fused and layer.k_norm else None,
            a.norm_eps,
            interleaved=rope is not None and rope.interleaved,
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
            alibi_slopes=self._slopes,
            soft_cap=a.attention_cap,
            max_query_len=batch.max_query_len,
            out=take("attended", rows, a.num_heads * a.head_dim),
        )

    def _norm_heads(self, qkv: Tensor, norm: Norm | None, first: int, heads: int) -> None:
        """In place, of the columns from `first` on."""
        how = self.architecture.qk_norm
        if how is None or norm is None:
            return
        count, width = (heads, self.architecture.head_dim) if how.per_head else (1, heads * self.architecture.head_dim)
        eps = self.architecture.norm_eps
        head_norm(qkv, norm.weight, norm.bias, eps, kind=how.kind, first=first, num_heads=count, width=width)

    def _norm_projections(self, qkv: Tensor, layer: LayerWeights, places: Tensor, take: Take) -> None:
        """In place: a norm over all of a projection, whose heads lie on the ranks."""
        assert self._ranks
        a, own, d, rows = self.architecture, self._ranks.partition.heads[self._ranks.rank], self._own.head_dim, len(qkv)
        everything = self._ranks.gather(qkv, "qkv", take("all_columns", rows, self._ranks.width("qkv")))
        whole = torch.index_select(everything, 1, places, out=take("projections", rows, len(places)))
        keys = a.num_heads * d
        self._norm_heads(whole, layer.q_norm, 0, a.num_heads)
        self._norm_heads(whole, layer.k_norm, keys, a.num_kv_heads)
        own_queries = len(own.queries) * d
        qkv[:, :own_queries] = whole[:, own.queries.start * d : own.queries.stop * d]
        qkv[:, own_queries : own_queries + len(own.kv_heads) * d] = whole[
            :, keys + own.kv_heads.start * d : keys + own.kv_heads.stop * d
        ]

    def close(self) -> None:
        """Lets go of the weights."""
        del self._weights, self._layers, self._cos_sin, self._workspace
