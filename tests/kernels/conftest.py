"""Each implementation of an op, for tests that hold all of them to one reference."""

from __future__ import annotations

import pytest


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
