"""Every kind of finding is provoked by a test of this folder, and mended by what can be pasted."""

from __future__ import annotations

import re

import yaml

from shared.doctor.compose import COMPOSE, EVERYWHERE, KUBERNETES, settings
from shared.doctor.remedies import REMEDIES
from tests.shared.doctor import test_cluster, test_container, test_gpus, test_host


def test_every_kind_of_finding_is_provoked() -> None:
    """Each row of these tables is a test of its own, which asserts the level, the message and the remedy."""
    provoked = {
        *test_cluster.PROVOKED,
        *test_cluster.PROVOKED_BY_PAIRS,
        test_cluster.PROVOKED_HERE,
        test_cluster.PROVOKED_BY_VERSION,
        test_cluster.PROVOKED_BY_DRAINING,
        *test_container.PROVOKED,
        *test_container.PROVOKED_TOGETHER,
        *test_gpus.PROVOKED,
        *test_host.PROVOKED,
        *test_host.PROVOKED_TOGETHER,
        test_host.PROVOKED_INSTRUCTIONS,
    }
    assert set(REMEDIES) - provoked == set(), "findings that no test provokes"
    assert provoked - set(REMEDIES) == set(), "tests of findings that there are not"


def test_every_kind_has_a_remedy_and_every_row_of_settings_is_quoted_by_one() -> None:
    assert all(text.strip() for text in REMEDIES.values())
    quoted = {row for text in REMEDIES.values() for row in re.findall(r"\{settings:([^}]*)\}", text)}
    assert quoted == set(COMPOSE)


def test_settings_are_yaml_of_a_service_and_of_a_pod() -> None:
    for row, text in COMPOSE.items():
        keys = yaml.safe_load(text)
        assert keys, row
        assert set(keys) <= {
            *("deploy", "environment", "ipc", "mem_limit", "pid", "pids_limit", "cpus"),
            *("tmpfs", "ulimits", "user", "volumes"),
        }
    for row, text in KUBERNETES.items():
        keys = yaml.safe_load(text)
        assert keys, row
        assert set(keys) <= {"containers", "volumes", "securityContext", "hostPID", "hostIPC"}
    assert set(KUBERNETES) <= set(COMPOSE)
    assert set(EVERYWHERE) <= set(COMPOSE)


def test_a_remedy_quotes_the_settings_with_the_values_that_are_needed() -> None:
    assert settings("memory") == (
        "compose.yaml, in the service:\n  mem_limit: 4g\n"
        "Kubernetes, in the pod's spec:\n  containers:\n    - resources:\n        limits:\n          memory: 4Gi"
    )
    assert settings("open files", nofile=8192) == "compose.yaml, in the service:\n  ulimits:\n    nofile: 8192"
