"""What an op's kernels are compiled for: the report compiles all of it ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments and the values of its constants, as a launcher would choose them.

    arguments: in the kernel's order, Triton's types ("*bf16", "i32", "fp32"); pointers are multiples of 16 bytes, and
    so are the integers named in `aligned`.
    max_registers: of a thread; None leaves it to ptxas.
    matrix: its hot loop has to use the matrix units, which on sm_90 means wgmma.
    """

    name: str
    kernel: Any  # a triton.jit function
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    matrix: bool = False
