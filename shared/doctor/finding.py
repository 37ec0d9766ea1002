"""What a check says: all is well, or what is amiss, what that means and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.doctor.compose import settings
from shared.doctor.remedies import REMEDIES

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """level: an error keeps Tandem from serving as configured, a warning makes it slower or frailer than need be."""

    check: str
    level: Level
    message: str  # what was found, and what it means
    remedy: str = ""  # empty where there is nothing to mend
    kind: str = ""  # the row of REMEDIES, empty likewise


def ok(check: str, message: str) -> Finding:
    """Nothing to mend."""
    return Finding(check, "ok", message)


def warning(check: str, kind: str, message: str, **values: object) -> Finding:
    """values: what the remedy of that kind leaves open, and what its settings are to say for the default values."""
    return Finding(check, "warning", message, _remedy(kind, values), kind)


def error(check: str, kind: str, message: str, **values: object) -> Finding:
    """Likewise."""
    return Finding(check, "error", message, _remedy(kind, values), kind)


def fault(severe: bool, check: str, kind: str, message: str, **values: object) -> Finding:
    """An error where it is severe, else a warning."""
    return (error if severe else warning)(check, kind, message, **values)


class _Settings:
    """What `{settings:open files}` in a remedy stands for."""

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def __format__(self, row: str) -> str:
        return settings(row, **self._values)


def _remedy(kind: str, values: dict[str, object]) -> str:
    return REMEDIES[kind].format(**values, settings=_Settings(values))
