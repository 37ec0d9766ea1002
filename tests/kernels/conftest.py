"""Each implementation of an op, for tests that hold all of them to one reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted, float32 is for `make test-slow`: there a kernel is the bfloat16 one without its roundings."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if Path(__file__).parent in item.path.parents and callspec is not None:
            interpreted = any("interpreted" in str(part) for part in callspec.id.split("-"))
            if interpreted and torch.float32 in callspec.params.values():
                item.add_marker(pytest.mark.slow)
