"""The limits that a container's cgroup sets, of version 2 or 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

_UNLIMITED_BYTES = 1 << 60  # version 1 writes "none" as a number beyond this


class Cgroup:
    """Of this process. proc, root: /proc and /sys/fs/cgroup. None = no limit.

    A limit of a parent holds for its children too, so the tightest on the way up counts. In a cgroup namespace, or
    below a mount of one's own cgroup, the path in /proc is not there: then the root is ours.
    """

    def __init__(self, proc: Path, root: Path) -> None:
        self._folders: dict[str, list[Path]] = {}  # controller, "" for version 2 -> our folder and those above it
        try:
            lines = (proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                tops = [root] if not controller else [root / controllers, root / controller]
                top = next((top for top in tops if top.is_dir()), root)
                self._folders[controller] = list(_upwards(top, path))

    @property
    def memory_bytes(self) -> int | None:
        return _least(
            [
                *self._numbers("", "memory.max"),
                *(n for n in self._numbers("memory", "memory.limit_in_bytes") if n < _UNLIMITED_BYTES),
            ]
        )

    @property
    def cpus(self) -> float | None:
        """Cores' worth of time."""
        quotas = [fields for fields in self._lines("", "cpu.max") if fields[0] != "max"]
        times = self._lines("cpu", "cpu.cfs_quota_us"), self._lines("cpu", "cpu.cfs_period_us")
        quotas += [[*quota, *period] for quota, period in zip(*times, strict=False) if int(quota[0]) > 0]
        return _least([int(quota) / int(period) for quota, period in quotas])

    @property
    def processes(self) -> int | None:
        """Processes and threads together."""
        return _least([*self._numbers("", "pids.max"), *self._numbers("pids", "pids.max")])

    def _numbers(self, controller: str, name: str) -> list[int]:
        return [int(fields[0]) for fields in self._lines(controller, name) if fields[0] != "max"]

    def _lines(self, controller: str, name: str) -> list[list[str]]:
        paths = [folder / name for folder in self._folders.get(controller, ())]
        return [path.read_text().split() for path in paths if path.is_file()]


def _upwards(top: Path, path: str) -> Iterator[Path]:
    relative = Path(path.lstrip("/"))
    if ".." not in relative.parts:  # outside of the namespace: not to be seen from here
        yield from (top / part for part in (relative, *relative.parents) if part != Path())
    yield top


_Number = TypeVar("_Number", int, float)


def _least(limits: list[_Number]) -> _Number | None:
    return min(limits, default=None)
