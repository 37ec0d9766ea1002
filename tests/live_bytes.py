"""How many bytes of tensors live at once.

with LiveBytes() as live:
    weights = load_weights(...)
live.now, live.peak     # bytes of the tensors that were made in there; memory that several share counts once
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what torch's ops return. Mapped files, and views of them, are of no op."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()  # tensors by id
        self._users: dict[int, int] = {}  # of a memory, by its address
        self._foreign: set[int] = set()  # addresses of memory that no op has made

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self._known:
                self._foreign.add(leaf.untyped_storage().data_ptr())
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(leaf) not in self._known:
                self._count(leaf)
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, tensor: Tensor) -> None:
        address, num_bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address in self._foreign or not num_bytes:
            return
        self._known.add(id(tensor))
        self._users[address] = self._users.get(address, 0) + 1
        self.now += num_bytes if self._users[address] == 1 else 0
        weakref.finalize(tensor, self._forget, id(tensor), address, num_bytes)

    def _forget(self, key: int, address: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._users[address] -= 1
        self.now -= 0 if self._users[address] else num_bytes


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
