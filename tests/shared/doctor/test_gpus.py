"""Findings about GPUs, their driver and what torch needs of them, with an NVML whose GPUs are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from shared.doctor import gpu_driver, gpus, software
from shared.doctor.examination import CHECKS, attempt
from shared.doctor.finding import Finding, Level
from shared.doctor.surroundings import Surroundings
from tests.shared.doctor.fake_nvml import FakeGpu, FakeNvml
from tests.shared.doctor.places import host, the, write

CUDA = "device=cuda"
TWO = (FakeGpu(), FakeGpu())
Check = Callable[[Surroundings], Iterable[Finding]]


def torch_of(folder: Path, cuda: str | None, *, triton: bool = True) -> list[str]:
    """A site-packages with a torch that is built for a version of CUDA."""
    names = ("torch", "triton") if triton else ("torch",)
    metadata = {
        f"{name}-3.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.0\n" for name in names
    }
    version = f"from typing import Optional\n__version__ = '3.0'\ncuda: Optional[str] = {cuda!r}\nhip: str = '9'\n"
    return [str(write(folder / "site", {**metadata, "torch/version.py": version}))]


# kind -> (check, level, what the host is, a part of the message, a part of the remedy)
PROVOKED: dict[str, tuple[Check, Level, Callable[[Path], Surroundings], str, str]] = {
    "no nvidia-ml-py": (
        gpu_driver.driver,
        "error",
        lambda p: replace(host(p, CUDA), nvml=None),
        "nvidia-ml-py is missing",
        "-m pip install nvidia-ml-py",
    ),
    "driver library missing": (
        gpu_driver.driver,
        "error",
        lambda p: host(p, CUDA, files={"dev/nvidia0": "", "dev/nvidiactl": ""}),
        "(nvidia0)",
        "capabilities: [gpu]",
    ),
    "no GPU": (
        gpu_driver.driver,
        "error",
        lambda p: host(p, CUDA),
        "there is no NVIDIA driver, and device is cuda",
        "nvidia.com/gpu: 1",
    ),
    "driver not loaded": (
        gpu_driver.driver,
        "error",
        lambda p: host(p, CUDA, nvml=FakeNvml(init="NVMLError_DriverNotLoaded")),
        "kernel module is not loaded",
        "modprobe nvidia",
    ),
    "driver versions differ": (
        gpu_driver.driver,
        "error",
        lambda p: host(p, CUDA, nvml=FakeNvml(init="NVMLError_LibRmVersionMismatch")),
        "another version than its kernel module",
        "restart the host",
    ),
    "NVML fails": (
        gpu_driver.driver,
        "warning",
        lambda p: host(p, nvml=FakeNvml(init="NVMLError_NoPermission")),
        "Insufficient Permissions",
        "nvidia-smi",
    ),
    "driver too old": (
        gpu_driver.driver,
        "error",
        lambda p: host(p, CUDA, nvml=FakeNvml(TWO, driver="470.82.01")),
        "470.82.01 is older than CUDA 12",
        "525",
    ),
    "capabilities missing": (
        gpu_driver.capabilities,
        "error",
        lambda p: host(p, CUDA, environment={"NVIDIA_DRIVER_CAPABILITIES": "compute,video"}),
        "leaves out utility",
        "NVIDIA_DRIVER_CAPABILITIES: compute,utility",
    ),
    "GPUs not given": (
        gpu_driver.visibility,
        "error",
        lambda p: host(p, CUDA, environment={"NVIDIA_VISIBLE_DEVICES": "void"}),
        "keeps every GPU out",
        "NVIDIA_VISIBLE_DEVICES: all",
    ),
    "GPUs hidden": (
        gpu_driver.visibility,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml(TWO), environment={"CUDA_VISIBLE_DEVICES": "1"}),
        "shows 1 of 2 GPUs",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "too few GPUs": (
        gpu_driver.visibility,
        "error",
        lambda p: host(p, CUDA, "decode.tp=3", nvml=FakeNvml(TWO)),
        "CUDA shows 2 GPUs, and a worker of tp 3 takes one for each",
        "let CUDA_VISIBLE_DEVICES name 3 GPUs",
    ),
    "GPUs in another order": (
        gpus.order,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml([FakeGpu("NVIDIA T4"), FakeGpu("NVIDIA L4")])),
        "different GPUs (NVIDIA L4, NVIDIA T4)",
        "CUDA_DEVICE_ORDER: PCI_BUS_ID",
    ),
    "MIG": (
        gpus.mig,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml([FakeGpu(mig=None), FakeGpu(mig=True)])),
        "GPU 1 is cut into instances",
        "nvidia-smi -i 1 -mig 0",
    ),
    "no peer access": (
        gpus.peer_access,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml([FakeGpu(barred={2: 1}), FakeGpu(), FakeGpu()])),
        "0 and 2: the chipset does not support it",
        "nvidia-smi topo -p2p r",
    ),
    "IOMMU": (
        gpus.peer_access,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml(TWO), files={"sys/kernel/iommu_groups/7/type": "DMA-FQ\n"}),
        "the IOMMU translates",
        "iommu=pt",
    ),
    "GPU slowed down": (
        gpus.clocks,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml([FakeGpu(), FakeGpu(throttled=0x40 | 0x80 | 0x4)])),
        "GPU 1: it is far too warm, the power supply asks for it",
        "nvidia-smi -q -d PERFORMANCE",
    ),
    "persistence mode off": (
        gpus.clocks,
        "warning",
        lambda p: host(p, CUDA, nvml=FakeNvml([FakeGpu(persistence=0)])),
        "off on GPU 0",
        "nvidia-smi -pm 1",
    ),
    "torch without CUDA": (
        software.versions,
        "error",
        lambda p: host(p, CUDA, import_path=torch_of(p, None)),
        "torch 3.0 is a build without CUDA",
        "device: cpu",
    ),
    "no triton": (
        software.versions,
        "error",
        lambda p: host(p, CUDA, import_path=torch_of(p, "12.8", triton=False)),
        "triton, in which its ops are written, is missing",
        "pip install triton",
    ),
    "CUDA newer than the driver": (
        software.versions,
        "error",
        lambda p: host(p, CUDA, import_path=torch_of(p, "13.0"), nvml=FakeNvml(TWO, cuda=12080)),
        "built for CUDA 13.0, and the driver knows CUDA up to 12.8",
        "torch's build for CUDA 12.8",
    ),
    "allocator of the driver": (
        software.allocator,
        "warning",
        lambda p: host(p, environment={"PYTORCH_ALLOC_CONF": "x:1,backend:cudaMallocAsync"}),
        "the KV pool lies outside of both",
        "out of PYTORCH_ALLOC_CONF",
    ),
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_each_finding_is_provoked(kind: str, tmp_path: Path) -> None:
    check, level, make, message, remedy = PROVOKED[kind]
    finding = the(check(make(tmp_path)), kind)
    assert finding.level == level
    assert message in finding.message
    assert remedy in finding.remedy


def test_a_host_with_two_gpus_and_nothing_amiss(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    identity = {"sys/kernel/iommu_groups/7/type": "identity\n"}
    environment = {"NVIDIA_DRIVER_CAPABILITIES": "all", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    surroundings = host(
        tmp_path, CUDA, nvml=nvml, files=identity, environment=environment, import_path=torch_of(tmp_path, "12.4")
    )
    checks = (*CHECKS["GPU"], software.versions)
    findings = [finding for check in checks for finding in attempt(check, surroundings)]
    assert {finding.level for finding in findings} == {"ok"}, findings
    assert {"gpu driver", "gpu visibility", "gpu order", "mig", "peer access", "clocks", "allocator", "versions"} <= {
        finding.check for finding in findings
    }
    assert nvml.sessions == 0, "every session is shut down"


def test_without_a_gpu_a_cpu_host_is_as_it_should_be(tmp_path: Path) -> None:
    for device in ("auto", "cpu"):
        surroundings = host(tmp_path / device, f"device={device}")
        findings = [finding for check in CHECKS["GPU"] for finding in attempt(check, surroundings)]
        assert [(finding.check, finding.level) for finding in findings] == [("gpu driver", "ok")]


@pytest.mark.parametrize(("visible", "level"), [("", "error"), ("-1,0", "error"), ("0,-1,1", "warning"), ("0,1", "ok")])
def test_what_cuda_visible_devices_shows(visible: str, level: str, tmp_path: Path) -> None:
    surroundings = host(tmp_path, CUDA, nvml=FakeNvml(TWO), environment={"CUDA_VISIBLE_DEVICES": visible})
    [finding] = gpu_driver.visibility(surroundings)
    assert finding.level == level


@pytest.mark.parametrize(("visible", "kind"), [("1", "too few GPUs"), ("1,0", "ok"), ("", "GPUs hidden")])
def test_a_rank_takes_a_gpu(visible: str, kind: str, tmp_path: Path) -> None:
    surroundings = host(tmp_path, CUDA, "tp=2", nvml=FakeNvml(TWO), environment={"CUDA_VISIBLE_DEVICES": visible})
    [finding] = gpu_driver.visibility(surroundings)
    assert kind in (finding.kind, finding.level)


def test_a_newer_minor_version_of_cuda_runs_on_the_driver(tmp_path: Path) -> None:
    surroundings = host(tmp_path, import_path=torch_of(tmp_path, "12.9"), nvml=FakeNvml(TWO, cuda=12020))
    assert {finding.level for finding in software.versions(surroundings)} == {"ok"}


def test_a_driver_that_fails_midway_is_a_finding_and_no_traceback(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    nvml.nvmlDeviceGetP2PStatus = lambda *_: (_ for _ in ()).throw(nvml.NVMLError_GpuIsLost())  # type: ignore[method-assign]
    finding = the(attempt(gpus.peer_access, host(tmp_path, CUDA, nvml=nvml)), "check failed")
    assert (finding.check, finding.level) == ("peer access", "warning")
    assert "GPU is lost" in finding.message
    assert nvml.sessions == 0
