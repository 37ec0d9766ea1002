"""What the modules have in common: a config that is checked, and memory for their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from kernels.dtypes import DTYPES
from shared.config.modules import ModuleConfig
from shared.workspace import Workspace

Config = TypeVar("Config", bound=ModuleConfig)


class Module(ABC, Generic[Config]):
    """A part of a model that computes as its config says, and holds no weights: they come with each call.

    Its results lie in memory of its own, allocated once for `max_tokens`: the next call overwrites them.
    """

    name: ClassVar[str]  # what the registry has it by
    config_class: ClassVar[type[ModuleConfig]]

    def __init__(self, config: Config, *, device: torch.device | str = "cpu") -> None:
        """Raises ValueError naming the field of a config that no op computes."""
        if objection := self.objection(config):
            raise ValueError(objection)
        self.config, self.device = config, torch.device(device)
        self._workspace = Workspace(self.device)

    @classmethod
    @abstractmethod
    def objection(cls, config: Config) -> str | None:
        """The field of a config that no op computes, and why; None where it is supported."""

    @classmethod
    def supports_config(cls, config: Config) -> bool:
        """Whether there is no objection."""
        return cls.objection(config) is None

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward."""

    def _take(self, name: str, rows: int, width: int, dtype: str) -> Tensor:
        """Memory of this module's own. ValueError for more rows than max_tokens."""
        if rows > self.config.max_tokens:
            raise ValueError(f"max_tokens: {rows} tokens, and the module was made for {self.config.max_tokens}")
        return self._workspace.take(name, rows, width, DTYPES[dtype])

    def _output(self, x: Tensor, width: int, dtype: str) -> Tensor:
        """Memory for the result of x [rows, features]. ValueError for x that lies there: it would be overwritten."""
        out = self._take("output", len(x), width, dtype)
        if len(x) and x.data_ptr() == out.data_ptr():
            raise ValueError(f"{self.name}: is given its own last result, which it would overwrite; make another one")
        return out


def check_dtype(name: str, x: Tensor, field: str, wanted: str) -> None:
    """Raises ValueError unless x has the dtype that a field of the config says."""
    if x.dtype != DTYPES[wanted]:
        raise ValueError(f"{name}: is {x.dtype}, and the config's {field} is {wanted}")


def same_dtypes(config: ModuleConfig, first: str, *others: str) -> str | None:
    """The objection to fields whose dtypes differ, of an op that writes what it reads."""
    wanted = getattr(config, first)
    for field in others:
        if getattr(config, field) != wanted:
            return f"{field}: {getattr(config, field)}, and {first} is {wanted}; the op has one dtype, give them alike"
    return None
