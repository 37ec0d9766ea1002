"""What the layers begin with: tokens looked up, with their positions and types, perhaps normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from kernels.embedding import embed
from shared.batch import RaggedBatch
from shared.config.modules import EmbeddingsConfig
from shared.engine.modules.module import Module
from shared.engine.modules.norm import norm_param, normed


class Embedding(Module[EmbeddingsConfig]):
    """hidden = norm(word_embeddings[token] + position_embeddings[position + offset] + token_type_embeddings[type])"""

    name = "ragged_embedding"
    config_class = EmbeddingsConfig

    def __init__(self, config: EmbeddingsConfig, *, eps: float = 1e-5, device: torch.device | str = "cpu") -> None:
        """eps: of the norm, if there is one."""
        super().__init__(config, device=device)
        self._eps = eps
        for name in ("output", *(("embedded",) if config.output_normalization else ())):
            self._take(name, config.max_tokens, config.embedding_dim, config.residual_dtype)

    @classmethod
    def objection(cls, config: EmbeddingsConfig) -> str | None:
        if config.positional_offset and not config.positional_embedding:
            return (
                f"positional_offset: {config.positional_offset}, and positional_embedding is false; leave it out, or "
                "set the other"
            )
        return None

    def transform_param(self, embed_param: Tensor) -> Tensor:
        """A table [rows, embedding_dim], gamma or beta, as a call wants it."""
        if embed_param.dim() == 1:
            return norm_param(embed_param, self.config.residual_dtype, self.device)
        return embed_param.to(self.device, DTYPES[self.config.residual_dtype]).contiguous()

    def __call__(
        self,
        ragged_batch: RaggedBatch,
        word_embeddings: Tensor,
        position_embeddings: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        token_type_embeddings: Tensor | None = None,
        *,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """-> [tokens, embedding_dim]. Tables [rows, embedding_dim], token_type_ids int64 [tokens].

        Raises ValueError for a part that the config has and the call has not, or the other way round.
        """
        config = self.config
        _agree("position_embeddings", position_embeddings, "positional_embedding", config.positional_embedding)
        _agree("token_type_ids", token_type_ids, "use_token_type", config.use_token_type)
        _agree("token_type_embeddings", token_type_embeddings, "use_token_type", config.use_token_type)
        if config.output_normalization is None:
            _agree("gamma", gamma, "output_normalization", False)
            _agree("beta", beta, "output_normalization", False)
        rows, width = ragged_batch.num_tokens, config.embedding_dim
        embedded = embed(
            word_embeddings,
            ragged_batch.token_ids,
            positions=ragged_batch.positions if config.positional_embedding else None,
            position_table=position_embeddings,
            offset=config.positional_offset,
            token_types=token_type_ids,
            type_table=token_type_embeddings,
            out=self._take("embedded" if config.output_normalization else "output", rows, width, config.residual_dtype),
        )
        if config.output_normalization is None:
            return embedded
        out = self._take("output", rows, width, config.residual_dtype)
        return normed(embedded, config.output_normalization, gamma, beta, self._eps, out)


def _agree(name: str, given: Tensor | None, field: str, wanted: bool) -> None:
    if (given is not None) != wanted:
        raise ValueError(f"{name}: {'is missing' if wanted else 'is given'}, and the config's {field} says otherwise")
