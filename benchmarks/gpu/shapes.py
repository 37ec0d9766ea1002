"""Which models and sizes are measured, and random parameters of a model's shape: what a figure of speed needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bursts import Bursts

Config = Mapping[str, Any]

LLAMA_8B: Config = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SMOLLM2_135M: Config = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
_TINY: Config = {
    **SMOLLM2_135M,
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and rows, unless said otherwise."""

    tests: str  # the folder, or the one, of which those for this device are run
    model: Config  # of ops and of the engine
    served: Mapping[str, Config]
    block_tokens: int
    copied_bytes: int
    matmul: int  # rows, columns and inner dimension
    int4_group: int
    few_rows: tuple[int, ...]  # of decode steps
    many_rows: int  # of a prompt
    attention: tuple[int, int]  # sequences, and tokens of each
    batches: tuple[int, int]  # of decode steps
    context: int  # of their sequences
    max_context: int
    long_context: int  # that a model may allow, and tables of blocks are made for
    generate: tuple[tuple[int, ...], int, int]  # batches, tokens of a prompt, tokens generated
    requests: tuple[int, int, int]  # to the service: at once, tokens of a prompt, tokens generated
    handoff: tuple[int, int]  # tokens of a prompt, and extents that it may be cut into
    crowded: Config  # the model of streams that long prompts arrive beside
    bursts: Bursts
    runs: int  # of which the median is taken
    calls: int  # timed together at least


FULL = Sizes(
    tests="tests",
    model=LLAMA_8B,
    # a few layers take and give what all would
    served={
        "SmolLM2-135M": SMOLLM2_135M,
        "4 layers of Llama-3.1-8B": {**LLAMA_8B, "num_hidden_layers": 4, "tie_word_embeddings": True},
    },
    block_tokens=16,
    copied_bytes=4 << 30,
    matmul=8192,
    int4_group=128,
    few_rows=(1, 16, 64),
    many_rows=4096,
    attention=(64, 4096),
    batches=(1, 64),
    context=1024,
    max_context=8192,
    long_context=131_072,
    generate=((1, 32), 512, 128),
    requests=(16, 512, 64),
    handoff=(2048, 4),
    crowded={**LLAMA_8B, "num_hidden_layers": 8, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    bursts=Bursts(streams=8, stream_tokens=600, prompt_tokens=4096, every_s=0.2),
    runs=9,
    calls=20,
)
SMOKE = Sizes(
    tests="tests/kernels/test_rms_norm.py::test_no_rows_are_no_work",
    model=_TINY,
    # the prompts' random tokens go up to 40,000
    served={"tiny": {**_TINY, "vocab_size": 49_152}},
    block_tokens=16,
    copied_bytes=1 << 20,
    matmul=64,
    int4_group=32,
    few_rows=(1, 3),
    many_rows=5,
    attention=(2, 40),
    batches=(1, 2),
    context=20,
    max_context=64,
    long_context=128,
    generate=((1, 2), 18, 3),
    requests=(4, 20, 6),
    handoff=(32, 2),
    crowded={**_TINY, "vocab_size": 49_152},
    bursts=Bursts(streams=2, stream_tokens=40, prompt_tokens=100, every_s=0.005),
    runs=1,
    calls=1,
)


def device() -> str:
    """Where it is measured: on a CPU only where Triton's interpreter is to run what a GPU would."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Those of a llama checkpoint, by their names in it."""
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, q),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
            }.items()
        }
    return shapes


class RandomCheckpoint:
    """A checkpoint of such a model, made of bfloat16 numbers where they are wanted."""

    def __init__(self, config: Config, where: str) -> None:
        self._shapes, self._device = parameter_shapes(config), where

    def names(self) -> set[str]:
        return set(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """Norms around 1, weights of 0.02."""
        shape = self._shapes[name]
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return empty.normal_(1.0, 0.1) if len(shape) == 1 else empty.normal_(0.0, 0.02)

    def integers(self, name: str) -> None:
        return None
