"""examples/diffusion.py: what it prints, and that both pipelines draw the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/diffusion.py"


def test_both_pipelines_draw_the_same_image() -> None:
    command = [sys.executable, str(EXAMPLE), "--size", "32", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"image difference: (\S+) at most", done.stdout)
    assert found
    assert float(found[1]) < 1e-4
    assert re.search(r"unet +group_norm_silu +engine \d+ layers", done.stdout)
    assert re.search(r"plain \S+ s, injected \S+ s: \S+ times", done.stdout)
