"""compose.yaml as `docker compose` understands it: variables filled in, files laid over each other.

    project = load(ROOT / "compose.yaml", ROOT / "compose.cpu.yaml", variables={"TANDEM_MODEL": "tiny"})
    service(project, "decode").environment["TANDEM_DEVICE"]

It follows https://github.com/compose-spec/compose-spec (12-interpolation, 13-merge) as far as our files go, and refuses
what it does not know rather than guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "compose.yaml"
CPU = ROOT / "compose.cpu.yaml"

# sequences that a later file replaces; it appends to all others
_REPLACED = {"command", "entrypoint", "test"}
# what may be a list of KEY=VALUE or a mapping
_MAPPINGS = {"environment", "args", "labels"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Reset:
    """The tag `!reset`: the key is taken away."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!reset", lambda loader, node: Reset())


@dataclass(frozen=True)
class Healthcheck:
    """Times in seconds."""

    test: Sequence[str]
    interval_s: float
    timeout_s: float
    retries: int
    start_period_s: float
    start_interval_s: float


@dataclass(frozen=True)
class Service:
    """What a container of a service is started with."""

    name: str
    keys: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.keys.get("environment", {}).items()}

    @property
    def command(self) -> list[str]:
        return list(self.keys["command"])

    @property
    def volumes(self) -> list[tuple[str, str, bool]]:
        """Source, target, and whether it can only be read."""
        parts = [text.split(":") for text in self.keys.get("volumes", ())]
        return [(source, target, rest == ["ro"]) for source, target, *rest in parts]

    @property
    def waits_for(self) -> dict[str, str]:
        """Service to condition."""
        wanted = self.keys.get("depends_on", {})
        if isinstance(wanted, list):
            return dict.fromkeys(wanted, "service_started")
        return {name: entry["condition"] for name, entry in wanted.items()}

    @property
    def healthcheck(self) -> Healthcheck | None:
        keys = self.keys.get("healthcheck")
        if keys is None:
            return None
        times = {f"{name}_s": seconds(keys[name]) for name in ("interval", "timeout", "start_period", "start_interval")}
        return Healthcheck(test=keys["test"], retries=keys["retries"], **times)


def load(*paths: Path, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The project of these files, the later ones laid over the earlier. variables: of the shell or .env.

    Raises ValueError for a variable that must be set and is not.
    """
    merged: Any = {}
    for path in paths:
        merged = _merge(merged, _read(path, variables or {}))
    return {key: value for key, value in merged.items() if not key.startswith("x-")}


def overlay(project: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The project with one more file, given as what it holds, laid over it."""
    return _merge(project, over)


def service(project: Mapping[str, Any], name: str) -> Service:
    return Service(name, project["services"][name])


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Fills in `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME-default}`, `${NAME:?message}`; `$$` is a dollar."""
    filled, rest = _interpolate(text, variables, nested=False)
    assert not rest
    return filled


def seconds(duration: str) -> float:
    """Of a duration such as 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    parts = re.findall(r"([\d.]+)(ms|h|m|s)", duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(f"{duration!r} is no duration")
    return sum(float(number) * units[unit] for number, unit in parts)


def _read(path: Path, variables: Mapping[str, str]) -> Any:
    return _fill(yaml.load(path.read_text(), _Loader), variables)


def _fill(value: Any, variables: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, str):
        return interpolate(value, variables)
    if isinstance(value, list):
        items = [_fill(item, variables) for item in value]
        return dict(item.split("=", 1) for item in items) if key in _MAPPINGS else items
    if isinstance(value, dict):
        filled = {name: _fill(item, variables, name) for name, item in value.items()}
        if key == "environment":
            # without a value: the shell's own, if it has one
            passed = {name: variables.get(name) if item is None else item for name, item in filled.items()}
            return {name: item for name, item in passed.items() if item is not None}
        return filled
    return value


def _interpolate(text: str, variables: Mapping[str, str], *, nested: bool) -> tuple[str, str]:
    """The text filled in, and what follows the brace that closes it."""
    filled = ""
    while text:
        if nested and text[0] == "}":
            return filled, text[1:]
        if text.startswith("$$"):
            filled, text = filled + "$", text[2:]
        elif text[0] != "$":
            filled, text = filled + text[0], text[1:]
        elif match := _NAME.match(text, 1):
            filled, text = filled + variables.get(match[0], ""), text[match.end() :]
        else:
            match = _NAME.match(text, 2) if text.startswith("${") else None
            if match is None:
                raise ValueError(f"{text!r}: a lone $; write $$")
            value, text = variables.get(match[0]), text[match.end() :]
            operator = next((known for known in (":-", "-", ":?", "?", "}") if text.startswith(known)), None)
            if operator is None:
                raise ValueError(f"${{{match[0]}{text}: an operator that is not known here")
            if operator == "}":
                filled, text = filled + (value or ""), text[1:]
                continue
            other, text = _interpolate(text[len(operator) :], variables, nested=True)
            missing = value is None or (operator[0] == ":" and not value)
            if missing and operator[-1] == "?":
                raise ValueError(f"{match[0]} must be set: {other}")
            filled += other if missing else value or ""
    if nested:
        raise ValueError("a ${ that nothing closes")
    return filled, ""


def _merge(below: Any, above: Any, key: str = "") -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for name, value in above.items():
            if isinstance(value, Reset):
                merged.pop(name, None)
            else:
                merged[name] = _merge(below[name], value, name) if name in below else value
        return merged
    if isinstance(below, list) and isinstance(above, list) and key not in _REPLACED:
        return [*below, *(item for item in above if item not in below)]
    return above
