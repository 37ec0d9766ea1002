"""The ops as Triton kernels: one file for each op that `kernels/` has, imported when its first CUDA tensor comes.

Only what a kernel itself says is fused: whether a compiler makes one instruction of a product and a sum may differ
between two kernels, and with it their bits. Where it pays, kernels say tl.fma.
"""

from triton import knobs

knobs.language.default_fp_fusion = False
