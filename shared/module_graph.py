"""One module as CUDA graphs: a whole model, or a part of one that cannot be a graph as a whole.

model.encoder = ModuleGraph(model.encoder)      # DeepSpeed's local CUDA graphs
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WARM_UPS = 3  # that what is made on first use is made before a capture
_MAX_GRAPHS = 8
# what an argument that is no tensor may be: it is the same at the next call if it is equal
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


class Capturer(Protocol):
    """Captures what a device computes, and has it computed again."""

    @property
    def device_type(self) -> str:
        """Whose tensors it follows."""
        ...

    def capture(self, compute: Callable[[], Any], warm_ups: int) -> tuple[Any, Callable[[], None]]:
        """Computes so often first -> what compute returned, and what has it computed into the same tensors again."""
        ...


class CudaCapturer:
    """By torch's CUDA graphs."""

    device_type = "cuda"

    def capture(self, compute: Callable[[], Any], warm_ups: int) -> tuple[Any, Callable[[], None]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = compute()
        return output, graph.replay


class ModuleGraph(nn.Module):
    """Calls a module; on CUDA by replaying a graph, one for each shape of arguments, the 8 last used of them.

    A graph's inputs and outputs are its own: arguments are copied in and results out, so nobody's tensors are kept. All
    tensors have to be on the capturer's device; without one there the module is called as it is. Other arguments are
    part of the shape: plain values, as an object may change and stay equal to itself. The module must not look at
    values on the host, and computes without gradients.
    """

    def __init__(self, module: nn.Module, capturer: Capturer | None = None) -> None:
        super().__init__()
        self.module = module
        self._capturer = capturer or CudaCapturer()
        self._graphs: dict[Hashable, _Captured] = {}

    # a part's results go on through the rest of the model, in whatever mode that runs: they are ordinary tensors
    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        device_type = self._capturer.device_type
        if not any(isinstance(leaf, Tensor) and leaf.device.type == device_type for leaf in leaves):
            return self.module(*args, **kwargs)
        key = (str(structure), *(_shape(leaf, device_type) for leaf in leaves))
        captured = self._graphs.pop(key, None) or _Captured(self._capturer, self.module, leaves, structure)
        self._graphs[key] = captured  # the last used is the last
        if len(self._graphs) > _MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return captured(leaves)

    @property
    def num_graphs(self) -> int:
        """Of those that are kept."""
        return len(self._graphs)


class _Captured:
    """A module's graph for arguments of one shape."""

    def __init__(self, capturer: Capturer, module: nn.Module, leaves: list[Any], structure: pytree.TreeSpec) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(self._inputs, structure)
        self._output, self._replay = capturer.capture(lambda: module(*args, **kwargs), _WARM_UPS)

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._replay()
        return pytree.tree_map(_copied, self._output)


def _copied(leaf: Any) -> Any:
    """A graph's result as the caller's own; a cache of transformers, say, with all the tensors that it holds."""
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _shape(leaf: Any, device_type: str) -> Hashable:
    """What must be alike for a graph to be replayed."""
    if isinstance(leaf, _PLAIN):
        return (type(leaf), leaf)
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"arguments of a graph are tensors and plain values, got a {type(leaf).__name__}: what it holds may be "
            "another at the next call; leave it out, or do without enable_cuda_graph"
        )
    if leaf.device.type != device_type:
        name = device_type.upper()
        raise ValueError(f"all tensors have to be on {name} beside one that is, got one on {leaf.device}")
    return (leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride())
