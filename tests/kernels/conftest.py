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
    """Interpreted, float32 is for `make test-slow`: there a kernel is the bfloat16 one without its roundings. So is
    float16, which differs in its roundings alone, but for the first test of a file."""
    seen: set[Path] = set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        if Path(__file__).parent not in item.path.parents or callspec is None:
            continue
        if not any("interpreted" in str(part) for part in callspec.id.split("-")):
            continue
        dtypes = callspec.params.values()
        if torch.float32 in dtypes or (torch.float16 in dtypes and item.path in seen):
            item.add_marker(pytest.mark.slow)
        elif torch.float16 in dtypes:
            seen.add(item.path)
