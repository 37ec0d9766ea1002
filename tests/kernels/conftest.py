"""Each implementation of an op, for tests that hold all of them to one reference."""

from __future__ import annotations

import pytest
import torch

from kernels import device


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tensors on the CPU computed by Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU of this machine")
    # Triton looks here when a kernel is defined: the files of kernels/cuda are first imported in such a test
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device, "INTERPRETED", True)


@pytest.fixture(
    params=[
        pytest.param("c"),
        pytest.param("triton, interpreted"),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def on(request: pytest.FixtureRequest) -> str:
    """The device that a test puts its tensors on, to have them computed in C, by Triton's interpreter, by Triton."""
    if request.param == "triton, interpreted":
        request.getfixturevalue("interpreter")
    return "cuda" if request.param == "triton" else "cpu"
