"""examples/init_inference.py: run as a program, in this process, which has torch already."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples/init_inference.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PATH), *arguments])
        runpy.run_path(str(PATH), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_tiny_model_is_injected_profiled_and_compared(
    run: Callable[..., str], tiny_model: Callable[[str], Path]
) -> None:
    out = run(str(tiny_model("llama")), "--tokens", "6", "--runs", "2")
    assert re.search(r"greedy tokens that agree: \d of 6", out)
    assert re.search(r"a step of decoding: plain [\d.]+ ms, injected [\d.]+ ms, the median of 2 runs each", out)
    assert re.search(r"layers: [\d.]+ ms each of 3, op by op", out)


@pytest.mark.slow
def test_the_default_model_decodes_faster(run: Callable[..., str], default_model: Path) -> None:
    out = run(str(default_model))
    speed_up = re.search(r"speed-up of decoding: ([\d.]+) x", out)
    assert speed_up
    assert float(speed_up[1]) >= 1.5
    agreeing = re.search(r"greedy tokens that agree: (\d+) of 32", out)
    assert agreeing
    assert int(agreeing[1]) >= 8  # bfloat16: two tokens that are nearly alike may fall either way later on
