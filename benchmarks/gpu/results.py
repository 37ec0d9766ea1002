"""The figures of a run on one device: written as soon as each is there, as JSON and as a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

# units: shares, the first two of what was measured in the same run
COPY, MATMUL, ANSWERS = "of copy bandwidth", "of matmul rate", "of answers"


@dataclass(frozen=True)
class Figure:
    """One line of the table. bar: the least value that is good enough, None where nothing is asked."""

    name: str
    value: float | None  # None: not measured, and the note says why
    unit: str
    bar: float | None = None
    note: str = ""
    seconds: float | None = None  # what was timed, where that is not the value itself

    @property
    def reached(self) -> bool | None:
        """None where there is no bar."""
        return None if self.bar is None else self.value is not None and self.value >= self.bar


class Results:
    """A file of results, which the processes of a run open one after another."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def create(cls, folder: Path, *, smoke: bool) -> Self:
        """A new file, named after the device."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        results = cls(folder / f"{slug(device)}.json", {"device": device, "smoke": smoke, **_host(), "parts": {}})
        results.path.parent.mkdir(parents=True, exist_ok=True)
        results.write()
        return results

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(path, json.loads(path.read_text()))

    def part(self, name: str) -> dict[str, Any]:
        """What is known of a part, to be changed and then written."""
        return self.values["parts"].setdefault(name, {"status": "", "figures": []})

    def add(self, part: str, figure: Figure) -> None:
        """In place of an earlier one of that name."""
        figures = self.part(part)["figures"]
        figures[:] = [known for known in figures if known["name"] != figure.name] + [asdict(figure)]
        self.write()

    def find(self, part: str, name: str) -> Figure | None:
        """None where it was not measured, or not yet."""
        known = self.values["parts"].get(part, {"figures": []})["figures"]
        figures = (Figure(**values) for values in known if values["name"] == name)
        return next((figure for figure in figures if figure.value is not None), None)

    @contextmanager
    def attempt(self, part: str, name: str, unit: str, bar: float | None = None) -> Iterator[None]:
        """Within it the figure is added; until then, or where it raises, the file says that it was not."""
        self.add(part, Figure(name, None, unit, bar, "not finished"))
        try:
            yield
        except Exception as error:  # the next figure is measured all the same
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self.add(part, Figure(name, None, unit, bar, f"{type(error).__name__}: {reason}"))

    def write(self) -> None:
        """Both files, each whole or as it was."""
        for path, text in (
            (self.path, json.dumps(self.values, indent=1) + "\n"),
            (self.path.with_suffix(".md"), table(self.values)),
        ):
            scratch = path.with_name(path.name + ".new")
            scratch.write_text(text)
            os.replace(scratch, path)


def table(values: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"# {values['device']}",
        "",
        f"{values['date']}: {', '.join(f'{name} {version}' for name, version in values['versions'].items())}. "
        + "`make gpu-check` makes this table"
        + (", here at sizes that say nothing about speed." if values["smoke"] else "."),
    ]
    for name, part in values["parts"].items():
        lines += ["", f"## {name}", "", part["status"] or "Not finished."]
        if part["figures"]:
            lines += ["", "| figure | value | bar | reached | measured |", "|---|---|---|---|---|"]
            lines += [_line(Figure(**known)) for known in part["figures"]]
        if part.get("failures"):
            lines += ["", *(f"- {failure}" for failure in part["failures"])]
    return "\n".join(lines) + "\n"


def slug(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _line(figure: Figure) -> str:
    bar = "" if figure.bar is None else _number(figure.bar, figure.unit)
    reached = {None: "", True: "yes", False: "no"}[figure.reached]
    note = figure.note.replace("|", "/")
    return f"| {figure.name} | {_number(figure.value, figure.unit)} | {bar} | {reached} | {note} |"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit in (COPY, MATMUL, ANSWERS):
        return f"{value:.0%} {unit}" if value >= 0.1 else f"{value:.1%} {unit}"
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{text}x" if unit == "x" else f"{text} {unit}"


def _host() -> dict[str, Any]:
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    host: dict[str, Any] = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "versions": versions}
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        properties = torch.cuda.get_device_properties()
        host |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return host
