"""The stream's beginning: tokens, positions and types looked up, with the table of tokens whole or on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.embedding import embed
from shared.models.ranks import Ranks
from shared.models.transformer import Take
from shared.models.weights import ModelWeights


def embedded(
    weights: ModelWeights,
    token_ids: Tensor,
    *,
    scale: float,
    positions: Tensor | None,
    offset: int,
    token_types: Tensor | None = None,
    ranks: Ranks | None,
    take: Take,
) -> Tensor:
    """[tokens, hidden], in the workspace's "stream"; token_ids int64, positions int32, token_types int64 [tokens], None
    where the model has none. On a CPU IndexError for one that it does not have."""
    table = weights.embedding
    if ranks is not None and ranks.partition.tokens:
        table, token_ids = _looked_up(table, token_ids, ranks, take)
    return embed(
        table,
        token_ids,
        scale=scale,
        positions=positions,
        position_table=None if positions is None else weights.positions,
        offset=offset,
        token_types=token_types,
        type_table=None if token_types is None else weights.token_types,
        out=take("stream", len(token_ids), table.shape[1]),
    )


def _looked_up(table: Tensor, token_ids: Tensor, ranks: Ranks, take: Take) -> tuple[Tensor, Tensor]:
    """A table of the tokens' rows, in their order, and their numbers in it. Each row is one rank's, unscaled: what is
    added to it is rounded together with it, once."""
    own, total = ranks.partition.tokens[ranks.rank], ranks.partition.whole.vocab_size
    if token_ids.device.type == "cpu" and len(unknown := ((token_ids < 0) | (token_ids >= total)).nonzero()):
        row = int(unknown[0])
        raise IndexError(f"token_ids[{row}] is {int(token_ids[row])}, and the table has {total} rows")
    is_own = (token_ids >= own.start) & (token_ids < own.stop)
    found = torch.where(is_own, token_ids - own.start, 0)
    rows = embed(table, found, out=take("token_rows", len(token_ids), table.shape[1]))
    rows.masked_fill_(~is_own[:, None], 0)
    return ranks.add_disjoint(rows), torch.arange(len(token_ids), device=token_ids.device)
