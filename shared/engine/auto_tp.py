"""AutoTP: a model of torch split over the ranks of a group as it is, its own code unchanged.

The search (linear_roles.py) says which linears are cut by outputs and which by inputs, split_attention.py which of
their rows and columns are heads; the output layer computes its rank's part of the vocabulary, and embeddings stay
whole. What a search finds is a guess: a model that is split has to answer as the whole one did, or it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shared.checkpoint import Checkpoint
from shared.engine.given import load_into, sizes_of
from shared.engine.linear_roles import Suffixes, roles_of
from shared.engine.own_answers import OwnAnswers
from shared.engine.split_attention import attentions_of
from shared.parallel.group import Group
from shared.parallel.linears import ColumnLinear, GatheredLinear, RowLinear
from shared.parallel.partition import Slice
from shared.parallel.sharding import Shard, head_shares

if TYPE_CHECKING:
    from shared.engine.hugging_face import PreTrainedModel

_LM_HEADS = ("lm_head", "embed_out")
_HALVES = ("gate_up_proj", "gate_up")  # two linears in one: the gate's rows, then the up's


@dataclass(frozen=True)
class Split:
    """How a model is to be split.

    fields: its config. grain: features that stay together where there are enough. suffixes: of the linears of modules
    whose inputs are cut, instead of a search.
    """

    group: Group
    fields: Mapping[str, object]
    grain: int
    suffixes: Suffixes | None = None

    def of(self, model: nn.Module, device: str, dtype: torch.dtype) -> None:
        """In place, of a model in memory, which is on that device and of that dtype then; it is float32 until then.

        Raises UnsupportedModelError for a model that cannot be split, or that answers otherwise when it is; ValueError
        for heads that cannot be cut.
        """
        splitter = _Splitter(model, self)
        own = OwnAnswers(model.float(), self.fields)
        splitter.split()
        own.check(model.to(device))
        model.to(dtype)
        splitter.tie()

    def of_checkpoint(
        self, model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, ignored: Iterable[str]
    ) -> nn.Module:
        """Another model, of one on the meta device, into which each rank reads its own part alone.

        What is proven is a shallow model with random weights. ignored: patterns of names that are not read. Raises as
        `of` does, and CheckpointError.
        """
        from shared.engine.hugging_face import shallow, without_weights

        self.of(shallow(model), self.group.device.type, torch.float32)
        made = without_weights(model, dtype)  # memory that nobody writes to takes none
        load_into(made, checkpoint, ignored, _Splitter(made, self).split())
        return made


class _Splitter:
    def __init__(self, model: nn.Module, how: Split) -> None:
        """Everything that can be refused is; nothing is changed."""
        group = how.group
        self._model, self._group = model, group
        self._shard = Shard(group.rank, group.size, how.grain)
        roles = roles_of(model, how.suffixes, str(how.fields.get("model_type")))
        sizes = sizes_of(how.fields)
        found = attentions_of(model, roles, sizes and sizes.num_heads, sizes and sizes.kv_heads)
        self._attentions = found
        self._of_attention = {path: one for one in found for path in (*one.inputs, one.output)}
        self._shares = {one.name: head_shares(one.num_heads, one.num_kv_heads, group.size)[group.rank] for one in found}
        self._linears = {path: self._cut(path, role) for path, role in roles.items()}
        self._head = self._output_layer(roles)
        self._tied: tuple[GatheredLinear, nn.Embedding, range] | None = None

    def split(self) -> dict[str, Slice]:
        """What of a parameter a rank has, by name; others it has whole."""
        cuts: dict[str, Slice] = {}
        for path, cut in self._linears.items():
            linear = self._linear(path)
            cuts[f"{path}.weight"] = cut
            if cut.dim == 0:
                self._put(path, ColumnLinear(linear, cut.ranges))
                cuts[f"{path}.bias"] = cut
            else:
                self._put(path, RowLinear(linear, cut.ranges, self._group))
        if self._head is not None:
            cuts |= self._split_head(self._head)
        configs: dict[int, object] = {}
        for attention in self._attentions:
            cuts |= attention.localize(self._shares[attention.name], configs)
        return cuts

    def tie(self) -> None:
        """Has the output layer read its rows of the embedding where that is the same; once more after a conversion."""
        if self._tied is not None:
            head, embedding, rows = self._tied
            head.weight = nn.Parameter(embedding.weight.detach()[rows.start : rows.stop], requires_grad=False)

    def _cut(self, path: str, role: str) -> Slice:
        linear, attention = self._linear(path), self._of_attention.get(path)
        if attention is not None:
            share = self._shares[attention.name]
            if role == "row":
                return Slice(1, tuple(attention.columns(linear.in_features, share)))
            return Slice(0, tuple(attention.rows(path, linear.out_features, share)))
        if role == "row":
            return Slice(1, (self._shard.share(linear.in_features),))
        if path.rpartition(".")[2] in _HALVES:
            half = linear.out_features // 2
            share = self._shard.share(half)
            return Slice(0, (share, range(half + share.start, half + share.stop)))
        return Slice(0, (self._shard.share(linear.out_features),))

    def _output_layer(self, roles: Mapping[str, str]) -> str | None:
        """Its name, if it is a linear beside the layers."""
        own = getattr(self._model, "get_output_embeddings", lambda: None)()
        for path, module in self._model.named_modules():
            is_head = module is own if own is not None else path.rpartition(".")[2] in _LM_HEADS
            if is_head and isinstance(module, nn.Linear) and path not in roles:
                return path
        return None

    def _split_head(self, path: str) -> dict[str, Slice]:
        linear = self._linear(path)
        shares = self._shard.shares(linear.out_features, "rows of the output layer")
        head = GatheredLinear(linear, shares, self._group)
        for module in self._model.modules():
            if isinstance(module, nn.Embedding) and module.weight is linear.weight:
                self._tied = head, module, shares[self._group.rank]
        self._put(path, head)
        self.tie()
        cut = Slice(0, (shares[self._group.rank],))
        return {f"{path}.weight": cut, f"{path}.bias": cut}

    def _linear(self, path: str) -> nn.Linear:
        module = self._model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, module)
