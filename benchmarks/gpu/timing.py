"""How long work takes on a device, and how many copies of its inputs keep a cache from holding them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch

Call = Callable[[], object]

_TIMED_S = 5e-3  # between two events, at least


def copies_of(num_bytes: float) -> int:
    """So many that together they are four times the last cache."""
    if not torch.cuda.is_available():
        return 1
    return min(max(-(-4 * torch.cuda.get_device_properties().L2_cache_size // max(int(num_bytes), 1)), 1), 64)


def call_s(calls: Sequence[Call], *, runs: int, at_least: int) -> float:
    """Median seconds of a call. The calls, each on memory of its own, follow each other in a CUDA graph, where nobody
    waits for a launch. at_least: so many in a graph."""
    for call in calls:  # what is compiled or made on first use
        call()
    if not torch.cuda.is_available():
        return statistics.median(host_s(call) for call in calls for _ in range(runs))
    repeated = list(islice(cycle(calls), max(at_least, len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    graph.replay()
    replays = math.ceil(_TIMED_S / max(device_s(graph.replay), 1e-6))
    times_s = [device_s(lambda: [graph.replay() for _ in range(replays)]) for _ in range(runs)]
    return statistics.median(times_s) / (replays * len(repeated))


def device_s(run: Call) -> float:
    """Seconds that the device worked on it, once it had begun."""
    if not torch.cuda.is_available():
        return host_s(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_s(run: Call) -> float:
    """Seconds on the host's clock, from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
