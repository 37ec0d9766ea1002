"""NVIDIA's driver, and which GPUs a container and a process get to see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.doctor.finding import Finding, error, fault, ok, warning
from shared.doctor.surroundings import Surroundings

OLDEST_DRIVER = 525  # the first of CUDA 12
_NEEDED = ("compute", "utility")  # libcuda, and NVML


@contextmanager
def opened(nvml: Any) -> Iterator[Any]:
    """NVML, ready for use; None where there is none, of which `driver` says why."""
    if nvml is None:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def driver(surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.may_use_gpu:
        yield ok("gpu driver", "not needed: device is cpu")
        return
    nvml, severe = surroundings.nvml, surroundings.needs_gpu
    if nvml is None:
        text = "the package nvidia-ml-py is missing, without which no GPU can be looked at"
        yield fault(severe, "gpu driver", "no nvidia-ml-py", text, python=sys.executable)
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as refused:
        yield _without_nvml(surroundings, refused)
        return
    try:
        version, count = str(nvml.nvmlSystemGetDriverVersion()), nvml.nvmlDeviceGetCount()
    finally:
        nvml.nvmlShutdown()
    if count == 0:
        yield _without_gpu(surroundings, f"the driver ({version}) shows no GPU")
    elif int(version.partition(".")[0]) < OLDEST_DRIVER:
        text = f"driver {version} is older than CUDA 12, for which torch and the ops are built"
        yield fault(severe, "gpu driver", "driver too old", text)
    else:
        yield ok("gpu driver", f"driver {version}, {count} GPUs" if count > 1 else f"driver {version}, one GPU")


def capabilities(surroundings: Surroundings) -> Iterator[Finding]:
    """What NVIDIA's container runtime was told to bring; images of CUDA's say it themselves."""
    given = surroundings.environment.get("NVIDIA_DRIVER_CAPABILITIES")
    if given is None or not surroundings.may_use_gpu:
        return
    missing = [name for name in _NEEDED if name not in given.split(",") and given != "all"]
    if missing:
        text = f"NVIDIA_DRIVER_CAPABILITIES={given} leaves out {' and '.join(missing)}: "
        text += "without compute there is no CUDA, without utility no NVML"
        yield fault(surroundings.needs_gpu, "gpu capabilities", "capabilities missing", text)
    else:
        yield ok("gpu capabilities", given)


def visibility(surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.may_use_gpu:
        return
    given = surroundings.environment.get("NVIDIA_VISIBLE_DEVICES")
    if surroundings.needs_gpu and given in ("", "none", "void"):
        text = f"NVIDIA_VISIBLE_DEVICES={given} keeps every GPU out of this container, and device is cuda"
        yield error("gpu visibility", "GPUs not given", text)
        return
    with opened(surroundings.nvml) as nvml:
        count = nvml.nvmlDeviceGetCount() if nvml else 0
    visible = surroundings.environment.get("CUDA_VISIBLE_DEVICES")
    if not count:
        return
    # CUDA reads the list up to the first that is none
    named = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    shown = next((i for i, name in enumerate(named) if not name or name.startswith("-")), len(named))
    config = surroundings.config
    ranks = max(config.tp_of(config.prefill), config.tp_of(config.decode)) if surroundings.needs_gpu else 1
    if 0 < shown < ranks:
        text = f"CUDA shows {shown} GPUs, and a worker of tp {ranks} takes one for each of its ranks"
        yield error("gpu visibility", "too few GPUs", text, ranks=ranks)
    elif visible is None:
        yield ok("gpu visibility", f"all {count} GPUs" if count > 1 else "the GPU is visible")
    elif shown == 0:
        text = f"CUDA_VISIBLE_DEVICES={visible} hides every GPU from CUDA"
        yield fault(surroundings.needs_gpu, "gpu visibility", "GPUs hidden", text)
    elif shown < count:
        text = (
            f"CUDA_VISIBLE_DEVICES={visible} shows {shown} of {count} GPUs: a pool on another one cannot be mapped here"
        )
        yield warning("gpu visibility", "GPUs hidden", text)
    else:
        yield ok("gpu visibility", f"CUDA_VISIBLE_DEVICES={visible} shows every GPU")


def _without_nvml(surroundings: Surroundings, refused: Any) -> Finding:
    nvml, severe, nodes = surroundings.nvml, surroundings.needs_gpu, ", ".join(surroundings.gpu_nodes)
    if isinstance(refused, nvml.NVMLError_LibraryNotFound):
        if nodes:
            text = (
                f"there are GPUs here ({nodes}), and the driver's libraries are not: the container runtime brought none"
            )
            return fault(severe, "gpu driver", "driver library missing", text)
        return _without_gpu(surroundings, "there is no NVIDIA driver")
    if isinstance(refused, nvml.NVMLError_DriverNotLoaded):
        return fault(
            severe, "gpu driver", "driver not loaded", "the driver is installed, and its kernel module is not loaded"
        )
    if isinstance(refused, nvml.NVMLError_LibRmVersionMismatch):
        text = "the driver's libraries are of another version than its kernel module"
        return fault(severe, "gpu driver", "driver versions differ", text)
    return fault(severe, "gpu driver", "NVML fails", f"the driver does not answer: {refused}")


def _without_gpu(surroundings: Surroundings, text: str) -> Finding:
    if surroundings.needs_gpu:
        return error("gpu driver", "no GPU", f"{text}, and device is cuda")
    return ok("gpu driver", f"{text}; device: {surroundings.config.device} needs none")
