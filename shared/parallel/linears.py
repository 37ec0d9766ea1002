"""nn.Linear cut for the ranks of a group: what takes its place in a module of torch.

ColumnLinear    some of the outputs, which whoever reads them next reads as its own
GatheredLinear  some of the outputs are computed, and all of them answered: the logits
RowLinear       some of the inputs are read, and the ranks' partial sums added: every rank answers the whole

The engine's own linears are another matter (shared/models/transformer.py): these are for a model whose code is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.parallel.group import Group


def taken(whole: Tensor, dim: int, ranges: Sequence[range]) -> Tensor:
    """A copy of ranges of a dimension, in order; contiguous."""
    return torch.cat([whole.narrow(dim, one.start, len(one)) for one in ranges], dim)


class ColumnLinear(nn.Module):
    """x [..., inputs] -> [..., its rows of the weight]."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rows: Sequence[range]) -> None:
        super().__init__()
        self.weight = _fixed(taken(linear.weight.detach(), 0, rows))
        self.in_features, self.out_features = linear.in_features, self.weight.shape[0]
        self.register_parameter("bias", None if linear.bias is None else _fixed(taken(linear.bias.detach(), 0, rows)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GatheredLinear(ColumnLinear):
    """x [..., inputs] -> [..., outputs], on every rank the same. Each output is summed by one rank."""

    def __init__(self, linear: nn.Linear, shares: Sequence[range], group: Group) -> None:
        """shares: the rows of each rank."""
        super().__init__(linear, [shares[group.rank]])
        self._widths, self._group = [len(share) for share in shares], group

    def forward(self, x: Tensor) -> Tensor:
        own = super().forward(x)
        whole = self._group.gather(own.reshape(-1, own.shape[-1]).contiguous(), self._widths)
        return whole.view(*own.shape[:-1], -1)


class RowLinear(nn.Module):
    """x [..., its columns of the weight], or all inputs -> [..., outputs], on every rank the same.

    The ranks' partial sums are added in float32 in the order of the ranks, then the bias, and rounded once.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, columns: Sequence[range], group: Group) -> None:
        super().__init__()
        self._columns, self._group = tuple(columns), group
        self._num_inputs = linear.in_features
        self.weight = _fixed(taken(linear.weight.detach(), 1, columns))
        self.in_features, self.out_features = self.weight.shape[1], linear.out_features
        self.register_parameter("bias", None if linear.bias is None else _fixed(linear.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self._num_inputs != self.in_features:
            x = taken(x, -1, self._columns)
        partial = functional.linear(x, self.weight).float().view(-1, self.out_features)
        total = self._group.add(partial, torch.empty_like(partial))
        if self.bias is not None:
            total += self.bias
        return total.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
