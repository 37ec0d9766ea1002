"""The GPUs themselves: their order, MIG, access to each other, clocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from shared.doctor.finding import Finding, ok, warning
from shared.doctor.gpu_driver import opened
from shared.doctor.surroundings import Surroundings

_READ = 0  # NVML_P2P_CAPS_INDEX_READ, which pynvml has as a tuple
# Of nvmlDeviceGetP2PStatus, as nvidia-smi topo says them.
_NO_ACCESS = {
    1: "the chipset does not support it",
    2: "a GPU does not support it",
    3: "the I/O hubs between them do not support it",
    4: "it is disabled in the driver's settings",
    5: "it is not supported",
    6: "the driver does not know",
}
_SLOW = {
    "HwSlowdown": "the hardware slows it down",
    "SwThermalSlowdown": "it is too warm",
    "HwThermalSlowdown": "it is far too warm",
    "HwPowerBrakeSlowdown": "the power supply asks for it",
}


def order(surroundings: Surroundings) -> Iterator[Finding]:
    with _gpus(surroundings) as (nvml, gpus):
        names = {str(nvml.nvmlDeviceGetName(gpu)) for gpu in gpus}
    given = surroundings.environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    if len(names) > 1 and given != "PCI_BUS_ID":
        text = (
            f"different GPUs ({', '.join(sorted(names))}), and CUDA numbers them by speed (CUDA_DEVICE_ORDER={given})"
        )
        yield warning("gpu order", "GPUs in another order", f"{text}: other numbers than nvidia-smi's")
    elif names:
        yield ok("gpu order", "CUDA's numbers are nvidia-smi's" if len(names) > 1 else f"all are {names.pop()}")


def mig(surroundings: Surroundings) -> Iterator[Finding]:
    with _gpus(surroundings) as (nvml, gpus):
        enabled = [i for i, gpu in enumerate(gpus) if _asked(nvml, nvml.nvmlDeviceGetMigMode, gpu, (0, 0))[0]]
    if enabled:
        numbers = ",".join(map(str, enabled))
        text = f"GPU {numbers} is cut into instances (MIG), between which CUDA maps no memory"
        yield warning("mig", "MIG", f"{text}: a handoff takes shared memory", gpus=numbers)
    elif gpus:
        yield ok("mig", "off")


def peer_access(surroundings: Surroundings) -> Iterator[Finding]:
    with _gpus(surroundings) as (nvml, gpus):
        pairs = list(combinations(range(len(gpus)), 2))
        status = {(a, b): nvml.nvmlDeviceGetP2PStatus(gpus[a], gpus[b], _READ) for a, b in pairs}
    barred = {pair: why for pair, why in status.items() if why != 0}
    if barred:
        pairs = "; ".join(f"{a} and {b}: {_NO_ACCESS.get(why, f'status {why}')}" for (a, b), why in barred.items())
        text = (
            f"GPUs cannot read each other's memory directly, so blocks between them pass through the host's ({pairs})"
        )
        yield warning("peer access", "no peer access", text)
    elif status:
        yield ok("peer access", f"every pair of {len(gpus)} GPUs reads each other's memory")
    if status and _translates(surroundings):
        text = "the IOMMU translates addresses, with which CUDA supports no access between GPUs over PCIe on bare metal"
        yield warning("peer access", "IOMMU", f"{text}: copies may be slow, or wrong")


def clocks(surroundings: Surroundings) -> Iterator[Finding]:
    with _gpus(surroundings) as (nvml, gpus):
        reasons = [_asked(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu, 0) for gpu in gpus]
        lazy = [i for i, gpu in enumerate(gpus) if _asked(nvml, nvml.nvmlDeviceGetPersistenceMode, gpu, 1) == 0]
        slow = {
            i: ", ".join(why for name, why in _SLOW.items() if mask & getattr(nvml, f"nvmlClocksThrottleReason{name}"))
            for i, mask in enumerate(reasons)
        }
    slowed = "; ".join(f"GPU {i}: {why}" for i, why in slow.items() if why)
    if slowed:
        yield warning("clocks", "GPU slowed down", f"clocks are held down ({slowed}), so steps take longer")
    elif gpus:
        yield ok("clocks", "nothing holds them down")
    if lazy:
        text = (
            f"persistence mode is off on GPU {', '.join(map(str, lazy))}: the driver lets go of it when nobody uses it"
        )
        yield warning("persistence", "persistence mode off", f"{text}, and the next start waits seconds for it")


@contextmanager
def _gpus(surroundings: Surroundings) -> Iterator[tuple[Any, list[Any]]]:
    """NVML and the GPUs' handles, none where there is no NVML or no GPU is wanted."""
    with opened(surroundings.nvml if surroundings.may_use_gpu else None) as nvml:
        count = nvml.nvmlDeviceGetCount() if nvml else 0
        yield nvml, [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]


def _asked(nvml: Any, function: Any, gpu: Any, default: Any) -> Any:
    """What a GPU answers, `default` if it has no such thing."""
    try:
        return function(gpu)
    except nvml.NVMLError_NotSupported:
        return default


def _translates(surroundings: Surroundings) -> bool:
    """Whether devices' addresses are translated: a group of type identity is passed through."""
    types = (surroundings.sys / "kernel/iommu_groups").glob("*/type")
    return any(path.read_text().startswith("DMA") for path in types)
