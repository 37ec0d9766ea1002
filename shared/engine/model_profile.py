"""How long a model's forwards take, and each of their layers: what `profile_model_time` of an engine switches on.

A moment is marked before and after, on the device's own clock or on the wall; marks become ms when they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

Mark = float | torch.cuda.Event
# has a function called after each layer, with its index, and before the first with -1; None: no more
ObserveLayers = Callable[[Callable[[int], None] | None], None]


class ModelProfile:
    """Of one model. `close` takes everything out of it again."""

    def __init__(self, module: nn.Module, observe: ObserveLayers | None, *, watches_calls: bool) -> None:
        """observe: how layers are observed; None: they are the blocks of the module's longest ModuleList.

        watches_calls: every call of the module is a forward; otherwise each is told by `whole`.
        """
        self._module, self._observe = module, observe
        self._forwards: list[tuple[Mark, Mark]] = []
        self._layers: list[list[Mark]] = []  # of each forward, one mark more than it has layers
        # of the call that is under way; of one that failed nothing stays
        self._begun: list[Mark] = []
        self._pending: list[Mark] = []
        self._by_events = False
        self.watches_calls = watches_calls
        self._hooks: list[Any] = []
        self._layer_hooks: list[Any] = []
        self.layers = False
        if watches_calls:
            self._watch_calls()

    def set(self, *, use_cuda_events: bool, layers: bool) -> None:
        """use_cuda_events: where there is a CUDA device. layers: they are timed, too."""
        self._by_events = use_cuda_events and torch.cuda.is_available()
        if layers and not self.layers:
            self._watch_layers()
            if not self.watches_calls:  # a graph is left out then, and the module itself is called
                self._watch_calls()
        elif self.layers and not layers:
            self._leave_layers()
            if not self.watches_calls:
                self._leave_calls()
        self.layers = layers

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around one forward."""
        begun = self._mark()
        yield
        self._forwards.append((begun, self._mark()))

    def model_times(self) -> list[float]:
        """ms of each forward; forgets them."""
        times = [_ms(begun, ended) for begun, ended in self._forwards]
        self._forwards.clear()
        return times

    def layer_times(self) -> list[list[float]]:
        """ms of each layer of each forward; forgets them."""
        times = [[_ms(begun, ended) for begun, ended in pairwise(marks)] for marks in self._layers]
        self._layers.clear()
        return times

    def close(self) -> None:
        self._leave_calls()
        if self.layers:
            self._leave_layers()

    def _mark(self) -> Mark:
        if self._by_events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _watch_calls(self) -> None:
        def before(*_: Any) -> None:
            self._pending, self._begun = [], [self._mark()]

        def after(*_: Any) -> None:
            if self._begun:
                self._forwards.append((self._begun.pop(), self._mark()))
            if self._pending:
                self._layers.append(self._pending)
                self._pending = []

        self._hooks = [self._module.register_forward_pre_hook(before), self._module.register_forward_hook(after)]

    def _leave_calls(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch_layers(self) -> None:
        def after(_: int) -> None:
            self._pending.append(self._mark())

        if self._observe is not None:
            self._observe(after)
            return
        blocks = _blocks(self._module)
        for index, block in enumerate(blocks):
            if index == 0:
                self._layer_hooks.append(block.register_forward_pre_hook(lambda *_: after(-1)))
            self._layer_hooks.append(block.register_forward_hook(lambda *_, index=index: after(index)))

    def _leave_layers(self) -> None:
        if self._observe is not None:
            with suppress(AttributeError):  # of a model that is closed already
                self._observe(None)
        for hook in self._layer_hooks:
            hook.remove()
        self._layer_hooks = []


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers: of all lists of modules the longest. Raises ValueError where there is none."""
    parts = module.modules() if isinstance(module, nn.Module) else ()  # a pipeline is none
    lists = [list(part) for part in parts if isinstance(part, nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    if not longest:
        raise ValueError(f"layers: {type(module).__name__} has no ModuleList, whose modules would be its layers")
    return longest


def _ms(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return begun.elapsed_time(ended)
    if isinstance(begun, float) and isinstance(ended, float):
        return (ended - begun) * 1000
    raise RuntimeError("the clock was changed in the middle of a forward")
