"""What all tests share: the default model, tiny models of every family, and a running service."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

# two workers on a few cores: OpenMP threads that spin would steal each other's cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tests.triton_mode  # noqa: F401

# isort: split
import pytest
import torch
from transformers import PreTrainedModel

from kernels import device
from tests.cluster import DEFAULT_MODEL_POOLS, Cluster
from tests.tiny_models import smollm2, smollm2_reference
from tests.tiny_models import tiny_model as make_tiny_model

# a shell's background job ignores Ctrl-C, and so would the processes that the tests send it to
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Folder of the default model, pulled on first use."""
    return smollm2().folder


@pytest.fixture(scope="session")
def default_reference() -> PreTrainedModel:
    """transformers' own reading of the default model's file, in float32: what our answers are compared with."""
    return smollm2_reference()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Path]:
    """Makes a tiny random model of a kind: a Hugging Face folder."""
    return make_tiny_model


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tensors on the CPU computed by Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU of this machine")
    # Triton looks here when a kernel is defined: the files of kernels/cuda are first imported in such a test
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device, "INTERPRETED", True)


@pytest.fixture(scope="session")
async def cluster(default_model: Path) -> AsyncIterator[Cluster]:
    """A prefill and a decode worker with the default model, for tests that leave them as they were."""
    async with Cluster(model=str(default_model), settings=DEFAULT_MODEL_POOLS) as cluster:
        yield cluster
