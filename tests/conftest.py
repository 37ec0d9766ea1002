"""What all tests share: the default model, tiny models of every family, and a running service."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

# two workers on a few cores: OpenMP threads that spin would steal each other's cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest

from tests.cluster import Cluster
from tests.tiny_models import smollm2
from tests.tiny_models import tiny_model as make_tiny_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Folder of the default model, pulled on first use."""
    return smollm2().folder


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Path]:
    """Makes a tiny random model of a kind: a Hugging Face folder."""
    return make_tiny_model


@pytest.fixture(scope="session")
async def cluster(default_model: Path) -> AsyncIterator[Cluster]:
    """A prefill and a decode worker with the default model, for tests that leave them as they were."""
    async with Cluster(model=str(default_model)) as cluster:
        yield cluster
