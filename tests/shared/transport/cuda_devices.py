"""The devices that tests hand blocks over with: one made of memory files, and the GPU of this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.transport.cuda import CudaDriver
from tests.shared.transport.fake_cuda import FakeCuda


class Gpu(CudaDriver):
    """Device 0, which can say what it was not given back."""

    mapped = 0  # allocations, own and others', of all of them

    def __init__(self) -> None:
        super().__init__(0)
        self._given: list[tuple[str, int]] = []

    def assert_clean(self) -> None:
        """Everything was given back."""
        assert not self._given, self._given

    def malloc(self, num_bytes: int) -> int:
        return self._give("memory", super().malloc(num_bytes))

    def free(self, address: int) -> None:
        super().free(address)
        self._take("memory", address)

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        address, size = super().open_handle(handle)
        return self._give("memory", address), size

    def close_handle(self, address: int) -> None:
        super().close_handle(address)
        self._take("memory", address)

    def create(self, num_bytes: int) -> tuple[int, int, int]:
        address, size, memory = super().create(num_bytes)
        return self._give("memory", address), size, memory

    def map_descriptor(self, fd: int, size: int, *, writes: bool = False) -> int:
        return self._give("memory", super().map_descriptor(fd, size, writes=writes))

    def unmap(self, address: int, size: int) -> None:
        super().unmap(address, size)
        self._take("memory", address)

    def create_event(self) -> int:
        return self._give("event", super().create_event())

    def open_event(self, handle: bytes) -> int:
        return self._give("event", super().open_event(handle))

    def destroy_event(self, event: int) -> None:
        super().destroy_event(event)
        self._take("event", event)

    def create_stream(self) -> int:
        return self._give("stream", super().create_stream())

    def destroy_stream(self, stream: int) -> None:
        super().destroy_stream(stream)
        self._take("stream", stream)

    def _give(self, kind: str, what: int) -> int:
        self._given.append((kind, what))
        Gpu.mapped += kind == "memory"
        return what

    def _take(self, kind: str, what: int) -> None:
        self._given.remove((kind, what))
        Gpu.mapped -= kind == "memory"


Cuda = FakeCuda | Gpu


def make_cuda(name: str) -> Cuda:
    """By the name that processes are told: fake, or gpu."""
    return {"fake": FakeCuda, "gpu": Gpu}[name]()


def write(tensor: Tensor, contents: bytes) -> None:
    """Over a pool, at once."""
    tensor.copy_(torch.frombuffer(bytearray(contents), dtype=torch.uint8))
    if tensor.is_cuda:
        torch.cuda.synchronize()


def read(tensor: Tensor) -> memoryview:
    """A pool's bytes; those of memory files are the very ones."""
    return memoryview(tensor.cpu().numpy())
