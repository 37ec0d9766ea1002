"""The packages that Tandem runs on, and what the environment tells torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

from kernels.bindings import bindings
from shared.doctor.finding import Finding, error, ok, warning
from shared.doctor.gpu_driver import opened
from shared.doctor.surroundings import Surroundings

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def versions(surroundings: Surroundings) -> Iterator[Finding]:
    """torch, its CUDA and triton, without loading them."""
    python = sys.executable
    found = {name: _version(surroundings, name) for name in ("torch", "triton", "transformers", "grpcio")}
    cuda = _torch_cuda(surroundings)
    yield ok("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in found.items()))
    if surroundings.needs_gpu and cuda is None:
        text = f"device: cuda, and torch {found['torch']} is a build without CUDA"
        yield error("versions", "torch without CUDA", text)
    if surroundings.needs_gpu and found["triton"] is None:
        yield error(
            "versions", "no triton", "device: cuda, and triton, in which its ops are written, is missing", python=python
        )
    if cuda is None or not surroundings.may_use_gpu:
        return
    with opened(surroundings.nvml) as nvml:
        driver = nvml.nvmlSystemGetCudaDriverVersion() if nvml else None  # such as 12080
    if driver is None:
        return
    driver_cuda = f"{driver // 1000}.{driver % 1000 // 10}"
    # within a major version any driver of it will do
    if int(cuda.partition(".")[0]) > driver // 1000:
        text = f"torch is built for CUDA {cuda}, and the driver knows CUDA up to {driver_cuda}: no kernel can run"
        yield error("versions", "CUDA newer than the driver", text, cuda=cuda, driver_cuda=driver_cuda)
    else:
        yield ok("versions", f"torch is built for CUDA {cuda}, which the driver (CUDA {driver_cuda}) runs")


def foreign_kernels(surroundings: Surroundings) -> Iterator[Finding]:
    if version := _version(surroundings, "kernels"):
        text = f"the package `kernels` {version} is installed: it and Tandem's folder of that name hide each other"
        yield error(
            "kernels", "kernels is installed", f"{text}, and transformers takes the wrong one", python=sys.executable
        )
    else:
        yield ok("kernels", "no package hides a folder of Tandem")


def ops(surroundings: Surroundings) -> Iterator[Finding]:
    """What computes each op on the device that is configured."""
    device = "cuda" if surroundings.needs_gpu else "cpu"
    for binding in bindings(device, surroundings.config.weights_dtype):
        yield ok("ops", f"{binding.op}: {binding.implementation}")


def allocator(surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.may_use_gpu:
        return
    for variable in _ALLOCATOR:
        value = surroundings.environment.get(variable, "")
        if re.search(r"\bbackend\s*:\s*cudaMallocAsync\b", value):
            text = (
                f"{variable}={value}: captured steps then keep memory of the driver's each, instead of sharing a pool "
                "of torch's; the KV pool lies outside of both, and is handed over as ever"
            )
            yield warning("allocator", "allocator of the driver", text, variable=variable)
        elif value:
            text = f"{variable}={value} is for torch's own tensors: the KV pool lies outside of its allocator"
            yield ok("allocator", text)


def _version(surroundings: Surroundings, name: str) -> str | None:
    found = next(iter(Distribution.discover(name=name, path=list(surroundings.import_path))), None)
    return found.version if found else None


def _torch_cuda(surroundings: Surroundings) -> str | None:
    """The CUDA version that torch is built for, None without."""
    for folder in surroundings.import_path:
        if (path := Path(folder) / "torch/version.py").is_file():
            match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", path.read_text(), re.MULTILINE)
            return match[1] if match else None
    return None
