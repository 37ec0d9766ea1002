"""examples/custom_policy.py: run as a program, in this process, which has torch already."""

import runpy
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples/custom_policy.py"


def test_the_engine_answers_as_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PATH), run_name="__main__")
    assert ended.value.code == 0
    assert "greedy tokens of 2 x 40: equal" in capsys.readouterr().out
