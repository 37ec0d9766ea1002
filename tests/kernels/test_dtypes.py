"""float16 on every instruction set: the same bits, and torch's."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import library

SOURCE = """
#include "simd.h"

void narrow_vectors(const float *x, uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) vf_write(y, i, VL, FLOAT16, vf_load(x + i));
}
void narrow_eights(const float *x, uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) write8(y, i, 8, FLOAT16, v8_load(x + i));
}
void widen_vectors(const uint16_t *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) vf_store(y + i, vf_read(x, i, VL, FLOAT16));
}
void widen_eights(const uint16_t *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) v8_store(y + i, read8(x, i, 8, FLOAT16));
}
"""
AVX2 = ("avx2", "fma")
INSTRUCTIONS = {"native": None, "portable": (), "AVX2": AVX2, "AVX2 and F16C": (*AVX2, "f16c"), "AVX-512": ("avx512f",)}


def halves() -> Tensor:
    """Each there is, as bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16)


def floats() -> Tensor:
    """Bits of float32: of each float16, what lies half way to the next, and what lies beside either."""
    exact = halves().view(torch.float16).float().view(torch.int32)
    random = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.cat([random, *(exact + step for step in (-1, 0, 1, 0xFFF, 0x1000, 0x1001))])


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(features, id=name, marks=[pytest.mark.slow] if name in ("AVX2", "AVX-512") else [])
        for name, features in INSTRUCTIONS.items()
    ],
)
def test_float16_has_the_same_bits_on_every_instruction_set(features: tuple[str, ...] | None, tmp_path: Path) -> None:
    flags = ["-march=native"]
    if features is not None:
        if platform.machine() != "x86_64" or not set(features) <= set(library._cpu_features().split()):
            pytest.skip("not this CPU's")
        flags = ["-march=x86-64", *(f"-m{feature}" for feature in features)]
    (tmp_path / "float16.c").write_text(SOURCE)
    common = [flag for flag in library.FLAGS if flag != "-march=native"]
    command = ["gcc", *common, *flags, "-I", str(library.SOURCE_DIR), "-shared", "float16.c", "-o", "float16.so", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    built = ctypes.CDLL(str(tmp_path / "float16.so"))

    def converted(op: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.full(x.shape, -1, dtype=dtype)
        getattr(built, op)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
        return y

    expected = floats().view(torch.float32).half().view(torch.int16)
    wide = halves().view(torch.float16).float().view(torch.int32)
    bits = floats()
    is_nan = bits.view(torch.float32).isnan()
    # a NaN keeps its sign and first bits, and is quiet
    expected[is_nan] = (bits >> 16 & -0x8000 | 0x7E00 | bits >> 13 & 0x3FF).to(torch.int16)[is_nan]
    for shape in ("vectors", "eights"):
        assert torch.equal(converted(f"narrow_{shape}", bits, torch.int16), expected), shape
        assert torch.equal(converted(f"widen_{shape}", halves(), torch.int32), wide), shape
