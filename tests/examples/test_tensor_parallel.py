"""examples/tensor_parallel.py: run as a program, which starts others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples/tensor_parallel.py"


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(PATH), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_give_the_tokens_of_one_process(tiny_model: Callable[[str], Path]) -> None:
    out = run(str(tiny_model("llama")), "--tokens", "8")
    drawn = dict(re.findall(r"rank (\d): 2 of 4 heads; drew (\[.*\])", out))
    assert drawn["0"] == drawn["1"]
    assert "8 greedy tokens of 2 ranks: those of one process" in out


@pytest.mark.slow
def test_three_ranks_share_the_default_model(default_model: Path) -> None:
    out = run(str(default_model), "--ranks", "3")
    assert "3 of 9 heads" in out
    assert "32 greedy tokens of 3 ranks: those of one process" in out
