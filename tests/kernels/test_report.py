"""The committed report of the compiled kernels: it knows every variant, none spills, and sm_90 has its wgmma."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks/results/kernels.md"
LIST = """
from kernels.cuda.report import all_variants
from kernels.cuda.variant import CAPABILITIES
for capability in CAPABILITIES:
    for variant in all_variants(capability):
        print(capability, variant.name, variant.matrix, sep="|")
"""


def rows() -> list[list[str]]:
    lines = [line for line in REPORT.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # in a process of its own: here kernels are made for Triton's interpreter
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_variant_is_in_the_report() -> None:
    done = run("-c", LIST)
    assert done.returncode == 0, done.stderr
    variants = [line.split("|") for line in done.stdout.splitlines()]
    names = [(capability, name) for capability, name, _ in variants]
    assert len(set(names)) == len(names), "two variants have one name"
    assert [(row[0], row[1]) for row in rows()] == names, "make kernel-report"
    instructions = {(row[0], row[1]): row[7] for row in rows()}
    for capability, name, matrix in variants:
        if matrix == "True" and capability == "90":
            assert instructions[capability, name] == "wgmma.mma_async"
    assert {row[5] for row in rows()} == {"0"}, "a kernel spills"


def test_a_spill_fails_the_report(tmp_path: Path) -> None:
    """A tile far too large, compiled as the report compiles."""
    script = """
from dataclasses import replace
from kernels.cuda import linear
from kernels.cuda.report import compile_variant, table
variant = next(v for v in linear.variants(90) if v.name.startswith("linear bf16 960 x 576 plain"))
huge = replace(variant, constants={**variant.constants, "OUTPUTS": 256, "ROWS": 256}, num_warps=4)
small = replace(variant, constants={**variant.constants, "OUTPUTS": 16, "ROWS": 16}, num_warps=1)
print(compile_variant(90, variant).faults, compile_variant(90, huge).faults, compile_variant(90, small).faults, sep="|")
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    good, spilling, plain = done.stdout.strip().split("|")
    assert good == "()"
    assert "spills" in spilling
    assert "uses mma.sync, not wgmma.mma_async" in plain


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_variant_compiles_without_faults(tmp_path: Path) -> None:
    table = tmp_path / "kernels.md"
    done = run("-m", "kernels.cuda.report", "--write", str(table))
    assert done.returncode == 0, done.stderr
    committed = [row[:2] for row in rows()]
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")][1:]
    assert [[cell.strip() for cell in line.strip("|").split("|")][:2] for line in lines] == committed
