"""The activations of a forward, allocated once: graphs and replays need it, and it saves page faults."""

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, each as large as its largest use so far. Two uses of a name share the memory."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], contiguous, with whatever was last written there."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(rows * width, dtype=dtype, device=self._device)
        return buffer[: rows * width].view(rows, width)
