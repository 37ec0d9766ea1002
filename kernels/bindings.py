"""Which implementation of an op computes on which device, for people to read: `./tandem doctor` prints it.

The ops choose by themselves, by the device of their tensors (device.py) and, of linears, by what their weight is packed
for (linear.py). Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernels.cpu import library

_FOLDER = Path(__file__).parent
# What a CPU has no C for, and what computes it there.
_ON_A_CPU = {
    "feed": "torch: a CPU's steps know their tokens",
    "penalties": "numpy, in shared/penalties.py: the host samples",
    "quantization": "torch, when weights are loaded",
}
_NO_OPS = ("bindings", "blocks", "device", "dtypes", "experts", "kv_format")
# Their bfloat16 products are dot products of pairs where the CPU has them.
_PAIRS = {"linear": "linear_pairs.c", "moe": "linear_pairs.c", "attention": "attention.c"}


@dataclass(frozen=True)
class Binding:
    """An op, and what computes it."""

    op: str
    implementation: str


def bindings(device: str, dtype: str) -> list[Binding]:
    """Every op, by name. device: cpu or cuda; dtype: of weights and activations.

    Raises RuntimeError where the CPU's ops cannot be compiled.
    """
    ops = sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem not in (*_NO_OPS, "__init__"))
    return [Binding(op, _on_cuda(op) if device == "cuda" else _on_a_cpu(op, dtype)) for op in ops]


def _on_a_cpu(op: str, dtype: str) -> str:
    if op in _ON_A_CPU:
        return _ON_A_CPU[op]
    instructions = library.instruction_set()
    has_pairs = op in _PAIRS and dtype == "bfloat16" and instructions == "AVX-512 BF16"
    sources = [_PAIRS[op] if has_pairs else "linear.c" if op == "moe" else f"{op}.c"]
    if op == "moe":
        sources.insert(0, "moe.c")
    if op in ("linear", "moe"):  # of weights whose rows are int8 too
        sources.append("linear_integers.c")
    return f"C ({', '.join(sources)}), {instructions}{': dot products of bfloat16 pairs' * has_pairs}"


def _on_cuda(op: str) -> str:
    if not (_FOLDER / "cuda" / f"{op}.py").is_file():
        return "torch, when weights are loaded"
    more = ", cuda/quantized_experts.py" if op == "moe" else ""
    return f"Triton (cuda/{op}.py{more})"
