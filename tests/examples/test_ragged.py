"""examples/ragged.py: run as a program, in this process, which has torch already."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples/ragged.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PATH), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PATH), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("step_tokens", ["8", "64"])
def test_a_tiny_model_generates_what_it_does_alone(
    run: Callable[..., str], tiny_model: Callable[[str], Path], step_tokens: str
) -> None:
    out = run(str(tiny_model("llama")), "--tokens", "40", "--step-tokens", step_tokens)
    assert "equal to generate's: 4 of 4" in out
    before, after = (int(count) for count in re.findall(r"(\d+) blocks are free", out))
    assert before < after
    assert re.search(r"the second goes on elsewhere: \d+ tokens in [\d,]+ bytes", out)


@pytest.mark.slow  # the tiny model takes the same ways
def test_the_default_model_generates_what_it_does_alone(run: Callable[..., str], default_model: Path) -> None:
    out = run()
    assert "' Paris." in out
    assert "equal to generate's: 4 of 4" in out
