"""What the decoder needs to know of a model. Families differ in the values here and in nothing else."""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `original_context` in tokens; fields a kind does not name are unused by it.

    linear: factor. llama3: factor, original_context, low_ and high_frequency_factor. yarn: factor, original_context,
    beta_fast, beta_slow, truncate. `attention_factor` multiplies cos and sin (1 but for yarn).
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """`sliding_window` has an entry per layer: how many tokens a query sees, itself included; None for all.

    `max_context` in tokens. `output_bias` is that of the attention's output projection.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Activation
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_context: int
    rope: Rope
    sliding_window: tuple[int | None, ...]

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5
