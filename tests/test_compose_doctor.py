"""What `tandem doctor` tells a container's owner to write is what compose.yaml has."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from shared.doctor.compose import COMPOSE as DEMANDED
from shared.doctor.compose import EVERYWHERE
from tests.compose import COMPOSE, CPU, ROOT, load

WORKERS = ("prefill", "decode")
# limits, for an owner who wants some: the file sets none
LIMITS = {"memory", "cpu quota"}
# the walls between containers, which one way of passing device memory on cannot have
WALLS = {"namespaces"}


def missing(demanded: Any, given: Any, path: str = "") -> list[str]:
    """What is demanded and not given, as paths; lists may hold more than what is demanded."""
    if isinstance(demanded, dict):
        if not isinstance(given, dict):
            return [path]
        return [one for key, value in demanded.items() for one in missing(value, given.get(key), f"{path}.{key}")]
    if isinstance(demanded, list):
        return [f"{path}: {item}" for item in demanded if item not in (given or ())]
    return [] if str(demanded) == str(given) else [f"{path}: {demanded}, got {given}"]


@pytest.mark.parametrize("check", sorted(DEMANDED.keys() - LIMITS - WALLS))
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_what_doctor_asks_for(name: str, check: str) -> None:
    assert not missing(yaml.safe_load(DEMANDED[check]), load(COMPOSE)["services"][name])


@pytest.mark.parametrize("check", EVERYWHERE)
@pytest.mark.parametrize("name", WORKERS)
def test_so_has_one_on_a_cpu_host(name: str, check: str) -> None:
    assert not missing(yaml.safe_load(DEMANDED[check]), load(COMPOSE, CPU)["services"][name])


@pytest.mark.parametrize("name", WORKERS)
def test_walls_are_down_only_where_that_is_asked_for(name: str) -> None:
    [check] = WALLS
    demanded = yaml.safe_load(DEMANDED[check])
    assert demanded
    handle = load(COMPOSE, ROOT / "deploy/compose.handle.yaml")["services"][name]
    assert not missing(demanded, handle)
    for project in (load(COMPOSE), load(COMPOSE, CPU)):
        assert len(missing(demanded, project["services"][name])) == len(demanded)


def test_what_is_missing_is_seen() -> None:
    assert missing({"a": {"b": ["x"]}}, {"a": {"b": ["y", "x"]}}) == []
    assert missing({"a": {"b": ["x"]}}, {"a": {}}) == [".a.b: x"]
    assert missing({"a": 1, "c": 2}, {"a": 1, "c": 3}) == [".c: 2, got 3"]
    assert missing({"a": {"b": 1}}, {}) == [".a"]
