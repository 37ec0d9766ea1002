"""The table of implementations is what the ops do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.bindings import Binding, bindings
from kernels.cpu import library
from kernels.linear import LinearWeight

KERNELS = Path(__file__).parents[2] / "kernels"


def implementation(op: str, device: str = "cpu", dtype: str = "float32") -> str:
    [found] = [binding.implementation for binding in bindings(device, dtype) if binding.op == op]
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_is_named_with_a_source_that_is_there(device: str) -> None:
    named = bindings(device, "bfloat16")
    assert {"linear", "attention", "rms_norm", "group_norm", "moe", "rope"} <= {binding.op for binding in named}
    for binding in named:
        sources = binding.implementation.partition("(")[2].partition(")")[0]
        for source in filter(None, sources.split(", ")):
            assert (KERNELS / "cpu" / source).is_file() or (KERNELS / source).is_file(), binding
        assert sources or binding.implementation.startswith(("torch", "numpy")), binding


def test_every_source_is_some_ops() -> None:
    text = " ".join(binding.implementation for dtype in ("float32", "bfloat16") for binding in bindings("cpu", dtype))
    for path in (KERNELS / "cpu").glob("*.c"):
        if path.stem not in ("team", "linear_pairs"):  # threads; and what only some CPUs run
            assert path.name in text, path
    text = " ".join(binding.implementation for binding in bindings("cuda", "bfloat16"))
    shared = {"__init__", "blocks", "elements", "report", "rows", "tile", "variant"}
    for path in (KERNELS / "cuda").glob("*.py"):
        assert path.stem in shared or path.name in text, path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears_are_packed_for_what_is_named(dtype: str) -> None:
    weight = LinearWeight(torch.randn(32, 16, dtype=getattr(torch, dtype)))
    assert ("pairs" in weight.description) == ("pairs" in implementation("linear", dtype=dtype))
    assert library.instruction_set() in implementation("linear", dtype=dtype)


def test_a_binding_is_plain() -> None:
    assert bindings("cuda", "bfloat16")[0] == Binding("activation", "Triton (cuda/activation.py)")
