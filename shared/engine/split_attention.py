"""Attention of a torch module cut by heads: rows of what makes its heads, and what its code knows of their number.

An attention is found by the linears that make queries, keys and values, by name; where these are one linear, the name
says how its rows lie. A rank has whole heads (shared/parallel/sharding.py), and the module's code counts them: in
attributes of its own, in its config, and in what is handed to it for each head, as ALiBi's biases.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from shared.checkpoint.cuts import HEADS, KV_HEADS
from shared.parallel.linears import taken
from shared.parallel.partition import Slice
from shared.parallel.sharding import HeadShare
from shared.policies.policy import UnsupportedModelError

# qkv: all queries, all keys, all values. groups: each key-value head behind its queries, and then its value.
Layout = Literal["queries", "kv", "qkv", "groups"]

_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "q", "wq", "q_b_proj", "kv_b_proj"), "queries"),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v", "wk", "wv"), "kv"),
    **dict.fromkeys(("qkv_proj", "Wqkv", "qkv", "W_pack"), "qkv"),
    **dict.fromkeys(("query_key_value", "wqkv"), "groups"),
}
_KEYS = ("k_proj", "key", "k_lin", "k", "wk")
_HEADS, _KV_HEADS = (*HEADS, "num_attn_heads", "nhead"), (*KV_HEADS, "num_kv")
_WIDTHS = ("all_head_size", "embed_dim", "hidden_size", "inner_dim", "split_size")
_BIASES = ("alibi", "position_bias")  # [heads, …] or [rows * heads, …]; others that are for heads are [rows, heads, …]


def is_attention_input(path: str) -> bool:
    return path.rpartition(".")[2] in _LAYOUTS


@dataclass(frozen=True)
class Attention:
    """An attention of a model."""

    name: str
    module: nn.Module  # that the heads are handed to
    num_heads: int
    num_kv_heads: int
    inputs: Mapping[str, Layout]  # by the linears' names in the model
    output: str

    def rows(self, path: str, out_features: int, share: HeadShare) -> list[range]:
        """Of one of the inputs, those of a rank. Raises UnsupportedModelError for rows that are not so many heads."""
        layout, queries, kv = self.inputs[path], self.num_heads, self.num_kv_heads
        heads = {"queries": queries, "kv": kv}.get(layout, queries + 2 * kv)
        if out_features % heads:
            raise UnsupportedModelError("num_attention_heads", f"{path}: {out_features} rows are not {heads} heads")
        unit = out_features // heads

        def scaled(first: int, part: range) -> range:
            return range((first + part.start) * unit, (first + part.stop) * unit)

        if layout == "queries":
            return [scaled(0, share.queries)]
        if layout == "kv":
            return [scaled(0, share.kv_heads)]
        if layout == "qkv":
            return [scaled(0, share.queries), scaled(queries, share.kv_heads), scaled(queries + kv, share.kv_heads)]
        per_group = queries // kv
        rows: list[range] = []
        for head in share.kv_heads:
            first = head * (per_group + 2)
            own = range(
                max(share.queries.start - head * per_group, 0), min(share.queries.stop - head * per_group, per_group)
            )
            rows += [scaled(first, own), scaled(first, range(per_group, per_group + 2))]
        return rows

    def columns(self, in_features: int, share: HeadShare) -> list[range]:
        """Of the output, those of a rank."""
        unit = in_features // self.num_heads
        return [range(share.queries.start * unit, share.queries.stop * unit)]

    def localize(self, share: HeadShare, configs: dict[int, Any]) -> dict[str, Slice]:
        """Has the module's code count a rank's heads -> what of its tables is the rank's, by their names in the model.

        configs: the ranks' own, by the id of the one that each is a copy of; those of a model's attentions.
        """
        cuts: dict[str, Slice] = {}
        queries, kv = len(share.queries), len(share.kv_heads)
        for path, module in self.module.named_modules(prefix=self.name):
            if isinstance(module, nn.Embedding) and module.embedding_dim == self.num_heads:
                cuts[f"{path}.weight"] = Slice(1, (share.queries,))
                module.weight = nn.Parameter(taken(module.weight.detach(), 1, [share.queries]), requires_grad=False)
                module.embedding_dim = queries
            self._count_heads(module, queries, kv)
            config = module.__dict__.get("config")
            if config is not None:
                if id(config) not in configs:
                    configs[id(config)] = local = copy.copy(config)
                    _replace(local, _HEADS, self.num_heads, queries)
                    _replace(local, _KV_HEADS, self.num_kv_heads, kv)
                module.config = configs[id(config)]
        self.module.register_forward_pre_hook(_own_heads(self.module, self.num_heads, share.queries), with_kwargs=True)
        return cuts

    def _count_heads(self, module: nn.Module, queries: int, kv: int) -> None:
        own = module.__dict__
        width = next((own[name] for name in _WIDTHS if isinstance(own.get(name), int)), 0)
        if any(own.get(name) == self.num_heads for name in _HEADS) and width % self.num_heads == 0:
            _replace(module, _WIDTHS, width, width // self.num_heads * queries)
        if own.get("num_key_value_groups") == self.num_heads // self.num_kv_heads:
            own["num_key_value_groups"] = queries // kv
        _replace(module, _HEADS, self.num_heads, queries)
        _replace(module, _KV_HEADS, self.num_kv_heads, kv)


def attentions_of(
    model: nn.Module, roles: Mapping[str, str], config_heads: int | None, config_kv_heads: int | None
) -> list[Attention]:
    """Those of a model whose linears have these roles. Raises UnsupportedModelError naming one that is not understood.

    config_heads, config_kv_heads: as the model's config says them, for modules that do not say it themselves.
    """
    by_holder: dict[str, dict[str, Layout]] = {}
    for path, role in roles.items():
        holder, _, leaf = path.rpartition(".")
        if role == "column" and leaf in _LAYOUTS:
            by_holder.setdefault(holder, {})[path] = _LAYOUTS[leaf]
    rows = [path for path, role in roles.items() if role == "row"]
    found: list[Attention] = []
    for holder, inputs in by_holder.items():
        owner = holder
        while owner and not any(path.startswith(f"{owner}.") for path in rows):
            owner = owner.rpartition(".")[0]
        ends = [path for path in rows if path.startswith(f"{owner}.") or not owner]
        if len(ends) > 1:  # a layer that has its linears side by side
            order = list(roles)
            ends = [path for path in ends if order.index(path) > max(map(order.index, inputs))][:1]
        if not ends:
            raise UnsupportedModelError("architectures", f"{holder}: which linear ends this attention is not known")
        modules = [model.get_submodule(holder), model.get_submodule(owner)]
        heads = next(_counts(modules, _HEADS), None) or config_heads
        if heads is None:
            raise UnsupportedModelError("num_attention_heads", f"neither {holder} nor the config says how many")
        kv_heads = _kv_heads(model, inputs, ends[0], heads)
        kv_heads = kv_heads or next(_counts(modules, _KV_HEADS), None) or config_kv_heads or heads
        found.append(Attention(owner, modules[1], heads, kv_heads, inputs, ends[0]))
    return found


def _kv_heads(model: nn.Module, inputs: Mapping[str, Layout], output: str, heads: int) -> int | None:
    """By the shapes, where keys have a linear of their own."""
    for path in inputs:
        if path.rpartition(".")[2] in _KEYS:
            key, end = model.get_submodule(path), model.get_submodule(output)
            assert isinstance(key, nn.Linear)
            assert isinstance(end, nn.Linear)
            return key.out_features * heads // end.in_features
    return None


def _counts(modules: Sequence[nn.Module], names: Sequence[str]) -> Iterator[int]:
    """What modules say by themselves, then what their configs say."""
    for holder in (*modules, *(getattr(module, "config", None) for module in modules)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                yield value


def _replace(holder: Any, names: Sequence[str], whole: int, own: int) -> None:
    for name in names:
        value = getattr(holder, name, None)
        if value == whole and isinstance(value, int) and not isinstance(value, bool):
            setattr(holder, name, own)


def _own_heads(module: nn.Module, num_heads: int, heads: range) -> Callable[..., Any]:
    """A hook that takes the rank's heads of every argument that has something for each head."""
    names = list(inspect.signature(module.forward).parameters)

    def own(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 4 and value.shape[1] == num_heads:
            return value[:, heads.start : heads.stop]
        if value.dim() == 3 and name in _BIASES and value.shape[0] % num_heads == 0:
            by_row = value.view(-1, num_heads, *value.shape[1:])
            return by_row[:, heads.start : heads.stop].flatten(0, 1)
        return value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken = [own(name, value) for name, value in zip(names, args, strict=False)]
        return (*taken, *args[len(names) :]), {name: own(name, value) for name, value in kwargs.items()}

    return hook
