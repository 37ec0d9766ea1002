"""One module of a larger model as CUDA graphs, where the whole model cannot be one: DeepSpeed's local CUDA graphs.

model.encoder = ModuleGraph(model.encoder)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WARM_UPS = 3  # that what is made on first use is made before a capture
_MAX_GRAPHS = 8


class ModuleGraph(nn.Module):
    """Calls a module; on CUDA by replaying a graph, one for each shape of arguments, the 8 last used of them.

    A graph's inputs and outputs are its own: arguments are copied in and results out, so nobody's tensors are kept. All
    tensors have to be on CUDA; without one the module is called as it is. Other arguments are part of the shape, so
    they have to be hashable. The module must not look at values on the host, and computes without gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._graphs: dict[Hashable, _Captured] = {}

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
            return self.module(*args, **kwargs)
        key = (str(structure), *map(_shape, leaves))
        captured = self._graphs.pop(key, None) or _Captured(self.module, leaves, structure)
        self._graphs[key] = captured  # the last used is the last
        if len(self._graphs) > _MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return captured(leaves)


class _Captured:
    """A module's graph for arguments of one shape."""

    def __init__(self, module: nn.Module, leaves: list[Any], structure: pytree.TreeSpec) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(self._inputs, structure)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                module(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = module(*args, **kwargs)

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._output)


def _shape(leaf: Any) -> Hashable:
    """What must be alike for a graph to be replayed."""
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf)
    if not leaf.is_cuda:
        raise ValueError(f"all tensors have to be on CUDA beside one that is, got one on {leaf.device}")
    return (leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride())
