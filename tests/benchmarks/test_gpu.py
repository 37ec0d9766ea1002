"""What `make gpu-check` measures with and writes, and the whole command at tiny sizes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.checks import read_chunk
from benchmarks.gpu.engine import make_plan, prefill_flops
from benchmarks.gpu.interference import _check_used, multi_process_service
from benchmarks.gpu.results import COPY, Figure, Results, slug, table
from benchmarks.gpu.shapes import FULL, LLAMA_8B, SMOKE, SMOLLM2_135M, RandomCheckpoint, parameter_shapes
from shared.models.loading import load_weights
from shared.policies.table import architecture_of

ROOT = Path(__file__).resolve().parent.parent.parent
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_the_table_says_what_was_reached_and_what_was_not(tmp_path: Path) -> None:
    results = Results.create(tmp_path, smoke=False)
    results.add("ops", Figure("copy", 4321.0, "GB/s", note="a | b"))
    results.add("ops", Figure("attention", 0.874, COPY, 0.85, "0.3 ms", 3e-4))
    results.add("ops", Figure("step", 0.012, COPY, 0.85))
    results.add("engine", Figure("replay", 3.21, "x", 3.0))
    with results.attempt("engine", "prefill", "x", 0.65):
        assert "| prefill | – | 0.65x | no | not finished |" in results.path.with_suffix(".md").read_text()
        raise RuntimeError("out of memory\nand more")
    with results.attempt("engine", "done", "s"):
        results.add("engine", Figure("done", 2.0, "s"))
    results.part("ops")["status"] = "Done in 3 s."
    results.part("tests").update(failures=["tests/a.py::b: wrong"])
    results.write()

    again = Results.open(results.path)
    assert again.values == results.values
    assert again.find("ops", "attention") == Figure("attention", 0.874, COPY, 0.85, "0.3 ms", 3e-4)
    assert again.find("engine", "prefill") is None
    assert again.find("service", "TTFT") is None
    text = results.path.with_suffix(".md").read_text()
    assert text == table(again.values)
    for line in (
        "| copy | 4,321 GB/s |  |  | a / b |",
        "| attention | 87% of copy bandwidth | 85% of copy bandwidth | yes | 0.3 ms |",
        "| step | 1.2% of copy bandwidth | 85% of copy bandwidth | no |  |",
        "| replay | 3.21x | 3x | yes |  |",
        "| prefill | – | 0.65x | no | RuntimeError: out of memory |",
        "| done | 2 s |  |  |  |",
        "Done in 3 s.",
        "Not finished.",
        "- tests/a.py::b: wrong",
    ):
        assert line in text.splitlines()


def test_a_device_names_its_files() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_what_a_fault_may_have_spoilt_is_run_again() -> None:
    tests = [f"tests/a.py::x[{i}, y]" for i in range(5)]
    passed, failed = (f"{test} PASSED [ 9%]" for test in tests[:1]), f"{tests[1]} FAILED [ 9%]"
    message = f"FAILED {tests[1]} - AssertionError: no"
    chunk = read_chunk(tests[:2], "\n".join([*passed, failed, message]))
    assert chunk.outcomes == {tests[0]: "PASSED", tests[1]: "FAILED"}
    assert chunk.messages == {tests[1]: "AssertionError: no"}
    assert chunk.again == []

    spoilt = [failed, f"{tests[2]} ERROR [ 9%]", "E   RuntimeError: CUDA error: an illegal memory access", message]
    assert read_chunk(tests[1:3], "\n".join(spoilt)).again == [tests[2]]

    chunk = read_chunk(tests[1:], "\n".join([failed, f"{tests[2]} ", "Fatal Python error: Segmentation fault"]))
    assert chunk.outcomes == {tests[1]: "FAILED", tests[2]: "FAILED"}
    assert "Segmentation fault" in chunk.messages[tests[2]]
    assert chunk.again == tests[3:]


def test_random_checkpoints_are_whole_models() -> None:
    model = SMOKE.model
    weights = load_weights(architecture_of(model), RandomCheckpoint(model, "cpu"), dtype=torch.bfloat16, device="cpu")
    assert len(weights.layers) == model["num_hidden_layers"]
    assert weights.embedding.float().std() == pytest.approx(0.02, rel=0.1)
    counts = {
        name: sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
        for name, config in (("llama", LLAMA_8B), ("smollm2", SMOLLM2_135M))
    }
    assert counts == {"llama": 8_030_261_248, "smollm2": 134_515_008}  # as their model cards say: 8.03B and 135M


def test_a_plan_has_room_for_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_plan(FULL)
    assert (plan.max_running, plan.max_context, plan.num_blocks) == (64, 8192, 1 + 64 * 1024 // 16)
    assert plan.layout.block_bytes == 16 * 128 * 1024
    assert [rope.kind for rope in plan.architecture.ropes if rope] == ["llama3"] * plan.architecture.num_layers


def test_the_work_of_a_prompt() -> None:
    per_layer = {"qkv": 6144 * 4096, "rest": 4096 * 4096 + 28672 * 4096 + 14336 * 4096}
    linears = 2 * (32 * 10 * per_layer["qkv"] + (31 * 10 + 1) * per_layer["rest"]) + 2 * 4096 * 128_256
    assert prefill_flops(LLAMA_8B, 10) == linears + 32 * 4 * 55 * 4096


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "ops,nothing"])
    assert (
        "nothing: none of tests, ops, engine, handoff, service, interference, transformers" in capsys.readouterr().err
    )


def test_without_a_gpu_nothing_is_run() -> None:
    command = [ROOT / "tools/gpu_check"]
    environment = {**NO_GPU, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "its torch sees no CUDA device" in done.stderr
    assert "nothing was run" in done.stderr


def test_the_multi_process_service_ends_with_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in its place that does as it is told."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "30")
    script = tmp_path / "nvidia-cuda-mps-control"
    script.write_text(
        """#!/usr/bin/env bash
        cd "$CUDA_MPS_PIPE_DIRECTORY"
        if [[ ${1-} == -f ]]; then
            [[ -v CUDA_MPS_ACTIVE_THREAD_PERCENTAGE ]] && exit 1
            mkfifo control
            exec cat control
        fi
        read -r command
        case $command in
            quit) echo >control ;;
            get_server_list) cat servers 2>/dev/null ;;
        esac
        """
    )
    script.chmod(0o755)
    with multi_process_service() as env:
        folder = Path(env["CUDA_MPS_PIPE_DIRECTORY"])
        with pytest.raises(RuntimeError, match="without the Multi-Process Service"):
            _check_used(env)
        (folder / "servers").write_text("4711\n")
        _check_used(env)
    assert not folder.exists()
    script.write_text('#!/bin/sh\necho "no device" >"$CUDA_MPS_LOG_DIRECTORY/control.log"; exit 1\n')
    with pytest.raises(RuntimeError, match="does not start: no device"), multi_process_service():
        pass
    script.unlink()
    monkeypatch.setattr("benchmarks.gpu.interference.shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="nvidia-cuda-mps-control is not installed"), multi_process_service():
        pass


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_whole_command_at_tiny_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=NO_GPU, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.open(tmp_path / "cpu.json")
    parts = results.values["parts"]
    assert {name: part["status"].split()[0] for name, part in parts.items()} == dict.fromkeys(
        ("tests", "ops", "engine", "handoff", "service", "interference", "transformers"), "Done"
    )
    figures = [Figure(**known) for part in parts.values() for known in part["figures"]]
    # a CPU has no matrix product of bfloat16 whose results are float32, and nothing that its processes would share
    missing = [figure for figure in figures if figure.value is None]
    assert all("cuBLAS" in figure.name or "MPS" in figure.name for figure in missing), missing
    assert sum(figure.bar is not None for figure in figures) == 18
    same = results.find("service", "tiny: answers that are the same alone")
    assert same is not None
    assert same.reached
    text = (tmp_path / "cpu.md").read_text()
    assert text in done.stdout
    assert "at sizes that say nothing about speed" in text
    assert all(f"| {figure.name} | " in text for figure in figures)
    assert json.loads((tmp_path / "cpu.json").read_text())["smoke"] is True
