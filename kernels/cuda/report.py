"""Compiles every kernel ahead of time and reads what became of it: `make kernel-report`. Needs no GPU.

    python -m kernels.cuda.report [--only TEXT] [--write FILE]

Fails where a kernel spills registers, or does not use the matrix units that it is to use.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.cuda.variant import CAPABILITIES, Variant

_WARP_THREADS = 32
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # the best that a kernel uses
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program may have
_WANTED = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """shared_bytes: per program; spilled_bytes: of a thread's stack."""

    capability: int
    name: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instruction: str
    faults: tuple[str, ...]


def all_variants(capability: int) -> list[Variant]:
    """Of every op in this folder."""
    found: list[Variant] = []
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        of_op = getattr(importlib.import_module(f"kernels.cuda.{path.stem}"), "variants", None)
        found += of_op(capability) if of_op else []
    return found


def compile_variant(capability: int, variant: Variant) -> Compiled:
    """Triton's errors come through."""
    names = list(variant.arguments)
    divisible = [n for n, kind in variant.arguments.items() if kind.startswith("*") or n in variant.aligned]
    source = ASTSource(
        variant.kernel,
        {**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, _WARP_THREADS),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": knobs.language.default_fp_fusion,
            "maxnreg": variant.max_registers,
        },
    )
    registers, spilled = _resources(compiled.asm["cubin"])
    instruction = next((name for name in _INSTRUCTIONS if name in compiled.asm["ptx"]), "")
    faults = [f"spills {spilled} bytes"] if spilled else []
    if compiled.metadata.shared > _SHARED_BYTES[capability]:
        faults.append(f"wants {compiled.metadata.shared} bytes of shared memory")
    if variant.matrix and instruction != _WANTED[capability]:
        faults.append(f"uses {instruction or 'no matrix instruction'}, not {_WANTED[capability]}")
    return Compiled(
        capability,
        variant.name,
        variant.num_warps,
        variant.num_stages,
        registers,
        spilled,
        compiled.metadata.shared,
        instruction,
        tuple(faults),
    )


def table(results: Sequence[Compiled]) -> str:
    """Markdown."""
    lines = [
        f"Triton {triton.__version__}; `make kernel-report` makes this table.",
        "",
        "| sm | kernel | warps | stages | registers | spilled | shared | matrix instruction |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.capability} | {r.name} | {r.num_warps} | {r.num_stages} | {r.registers} | {r.spilled_bytes} "
        f"| {r.shared_bytes} | {r.instruction or '–'} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for sm_80, sm_90 and sm_100")
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--write", type=Path, help="the file for the table")
    parser.add_argument("--sm", type=int, choices=CAPABILITIES, action="append", help="default: all")
    options = parser.parse_args()
    results: list[Compiled] = []
    # processes: Triton's compiler holds Python's lock
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for capability in options.sm or CAPABILITIES:
            indices = [i for i, v in enumerate(all_variants(capability)) if options.only in v.name]
            for result in pool.map(partial(_compile_numbered, capability), indices, chunksize=1):
                results.append(result)
                for fault in result.faults:
                    print(f"sm_{capability} {result.name}: {fault}", file=sys.stderr)
    text = table(results)
    if options.write:
        options.write.write_text(text)
    else:
        print(text)
    failed = sum(1 for result in results if result.faults)
    print(f"{len(results)} kernels compiled, {failed} with faults", file=sys.stderr)
    return bool(failed or not results)


def _compile_numbered(capability: int, index: int) -> Compiled:
    """A variant by its number: kernels cannot be sent to another process."""
    return compile_variant(capability, all_variants(capability)[index])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which is where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump prints its resources in another way: {printed}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    raise SystemExit(main())
