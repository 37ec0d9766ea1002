"""Where the doctor looks: the configuration, the environment, and the kernel's and driver's own tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.config import TandemConfig

# The kernel's numbers for the namespaces of the host itself (include/linux/proc_ns.h).
_HOST_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}


def _load_nvml() -> Any:
    """The module pynvml, None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


@dataclass(frozen=True)
class Surroundings:
    """Everything that a check reads, besides what it tries out."""

    config: TandemConfig
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    import_path: Sequence[str] = field(default_factory=lambda: list(sys.path))
    nvml: Any = field(default_factory=_load_nvml)  # has pynvml's functions, constants and errors

    @property
    def needs_gpu(self) -> bool:
        return self.config.device == "cuda"

    @property
    def may_use_gpu(self) -> bool:
        return self.config.device != "cpu"

    @property
    def gpu_nodes(self) -> list[str]:
        """The device nodes of NVIDIA GPUs, such as nvidia0."""
        return sorted(path.name for path in self.dev.glob("nvidia[0-9]*"))

    def is_host_namespace(self, kind: str) -> bool:
        """Whether this process is in the host's own namespace. kind: pid or ipc."""
        return os.readlink(self.proc / "self" / "ns" / kind) == f"{kind}:[{_HOST_NAMESPACES[kind]}]"

    @cached_property
    def in_container(self) -> bool:
        """Docker and podman leave a file, Kubernetes a variable; others give a PID namespace at least."""
        return (
            (self.root / ".dockerenv").exists()
            or (self.root / "run/.containerenv").exists()
            or "KUBERNETES_SERVICE_HOST" in self.environment
            or not self.is_host_namespace("pid")
        )
