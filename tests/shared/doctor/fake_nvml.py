"""NVML as pynvml has it, of GPUs that are not there: its functions, with its own constants and errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pynvml


@dataclass
class FakeGpu:
    name: str = "NVIDIA H100"
    mig: bool | None = False  # None: such GPUs know nothing of it
    throttled: int = 0
    persistence: int = 1
    barred: dict[int, int] = field(default_factory=dict)  # other GPU's index -> status of reading its memory


class FakeNvml:
    """init: the error that nvmlInit raises, such as NVMLError_DriverNotLoaded."""

    def __init__(
        self,
        gpus: Sequence[FakeGpu] = (),
        *,
        driver: str = "570.124.06",
        cuda: int = 12080,
        init: str | None = "NVMLError_LibraryNotFound",
    ) -> None:
        self._gpus, self._driver, self._cuda = list(gpus), driver, cuda
        self._init = None if gpus else init
        self.sessions = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(pynvml, name)
        assert not callable(value) or isinstance(value, type), f"{name} would ask this host's own driver"
        return value

    def nvmlInit(self) -> None:
        if self._init:
            raise getattr(pynvml, self._init)()
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1
        assert self.sessions >= 0

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._asked(self._driver)

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self._asked(self._cuda)

    def nvmlDeviceGetCount(self) -> int:
        return self._asked(len(self._gpus))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return self._asked(index)

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return self._asked(self._gpus[gpu].name)

    def nvmlDeviceGetMigMode(self, gpu: int) -> list[int]:
        if (mig := self._gpus[gpu].mig) is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self._asked([int(mig), int(mig)])

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return self._asked(self._gpus[gpu].throttled)

    def nvmlDeviceGetPersistenceMode(self, gpu: int) -> int:
        return self._asked(self._gpus[gpu].persistence)

    def nvmlDeviceGetP2PStatus(self, gpu: int, other: int, index: int) -> int:
        assert isinstance(index, int)  # ctypes takes nothing else
        return self._asked(self._gpus[gpu].barred.get(other, 0))

    def _asked(self, answer: Any) -> Any:
        if not self.sessions:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return answer
