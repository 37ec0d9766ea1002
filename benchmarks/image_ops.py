"""The ops of image models beside torch's, by turns, in shapes of Stable Diffusion's UNet and VAE.

    .venv/bin/python -m benchmarks.image_ops

On one thread by its own CPU time, the least of some rounds: what else the machine does counts little then. What of
shared/engine/image_bindings.py is chosen by measurement is chosen by this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.activation import gated
from kernels.attention import dense_attention
from kernels.group_norm import group_norm, group_norm_reference
from kernels.layer_norm import layer_norm
from kernels.linear import LinearWeight, linear

ROUNDS = 7
BATCH = 2  # with guidance, an image is computed twice

Case = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]  # name, ours, torch's


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| op | dtype | torch ms | engine ms | ratio |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for make in (norms, attentions, linears, activations):
            for name, ours, theirs in make(dtype):
                measured = by_turns(ours, theirs)
                ratio = measured[1] / measured[0]
                dtype_name = str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {dtype_name} | {measured[1] * 1e3:.3g} | {measured[0] * 1e3:.3g} | {ratio:.2f} |",
                    flush=True,
                )


def by_turns(*ops: Callable[[], Tensor]) -> list[float]:
    """The least time of each, seconds."""
    times: list[list[float]] = [[] for _ in ops]
    for _ in range(1 + ROUNDS):
        for op, measured in zip(ops, times, strict=True):
            started = time.thread_time()
            op()
            measured.append(time.thread_time() - started)
    return [min(measured[1:]) for measured in times]


def norms(dtype: torch.dtype) -> Iterator[Case]:
    for channels, positions in ((320, 4096), (640, 1024), (1280, 256), (128, 65536)):
        x, weight, bias = random(dtype, BATCH, channels, positions), random(dtype, channels), random(dtype, channels)
        for silu in (True, False):
            yield (
                f"GroupNorm{' + SiLU' * silu} {list(x.shape)}",
                lambda x=x, w=weight, b=bias, silu=silu: group_norm(x, 32, w, b, 1e-5, silu=silu),
                lambda x=x, w=weight, b=bias, silu=silu: group_norm_reference(x, 32, w, b, 1e-5, silu=silu),
            )
    for rows, width in ((8192, 320), (2048, 640)):
        x, weight, bias = random(dtype, rows, width), random(dtype, width), random(dtype, width)
        yield (
            f"LayerNorm {list(x.shape)}",
            lambda x=x, w=weight, b=bias: layer_norm(x, w, b, 1e-5),
            lambda x=x, w=weight, b=bias, width=width: functional.layer_norm(x, (width,), w, b, 1e-5),
        )


def attentions(dtype: torch.dtype) -> Iterator[Case]:
    for queries, keys, heads, head_dim in (
        (1024, 1024, 8, 40),
        (1024, 1024, 10, 64),
        (256, 256, 8, 80),
        (1024, 1024, 1, 512),
        (4096, 77, 8, 40),
        (1024, 77, 8, 80),
    ):
        q = random(dtype, BATCH * queries, heads, head_dim)
        k, v = random(dtype, BATCH * keys, heads, head_dim), random(dtype, BATCH * keys, heads, head_dim)
        lengths = torch.arange(BATCH + 1, dtype=torch.int32)
        yield (
            f"attention, {queries} queries, {keys} keys, {heads} heads of {head_dim}",
            lambda q=q, k=k, v=v, a=lengths * queries, b=lengths * keys, n=keys: dense_attention(
                q, k, v, a, b, 0.1, causal=False, max_seqlen_k=n
            ),
            lambda q=q, k=k, v=v: torch_attention(q, k, v),
        )


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.unflatten(0, (BATCH, -1)).transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, scale=0.1).transpose(1, 2).contiguous()


def linears(dtype: torch.dtype) -> Iterator[Case]:
    for rows, inputs, outputs in ((8192, 320, 960), (8192, 320, 2560), (2048, 640, 1920), (512, 1280, 1280)):
        x, weight, bias = random(dtype, rows, inputs), random(dtype, outputs, inputs), random(dtype, outputs)
        packed = LinearWeight(weight, bias)
        yield (
            f"linear, {rows} rows, {inputs} to {outputs}",
            lambda x=x, packed=packed: linear(x, packed),
            lambda x=x, w=weight, b=bias: functional.linear(x, w, b),
        )


def activations(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in ((8192, 1280), (2048, 2560)):
        x = random(dtype, rows, 2 * width)
        yield f"GEGLU {list(x.shape)}", lambda x=x: gated(x, "gelu"), lambda x=x: torch_geglu(x)


def torch_geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.gelu(gate) * up


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


if __name__ == "__main__":
    main()
