"""examples/custom_policy.py, as its docstring says to run it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_engine_answers_as_the_model() -> None:
    command = [sys.executable, "examples/custom_policy.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "greedy tokens of 2 x 40: equal" in done.stdout
