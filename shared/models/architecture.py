"""What the transformer needs to know of a model. Families differ in the values here and in nothing else."""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "quick_gelu"]
NormKind = Literal["rms", "layer"]
NormOrder = Literal["pre", "post", "output", "sandwich"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `original_context` in tokens; fields a kind does not name are unused by it.

    linear: factor. llama3: factor, original_context, low_ and high_frequency_factor. yarn: factor, original_context,
    beta_fast, beta_slow, truncate. longrope: factors, one for each pair of dimensions. `attention_factor` multiplies
    cos and sin (1 but for yarn and longrope). Of each head the first `dim` dimensions turn; `interleaved` says which
    two make a pair (kernels/rope.py).
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    factors: tuple[float, ...] = ()
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class QkNorm:
    """What queries and keys are normalised by, each head (`per_head`) or all of a projection at once.

    shared: one weight of head_dim serves all heads. Of heads with a shared weight and "rms" the rope op takes care.
    """

    kind: NormKind
    bias: bool
    per_head: bool
    shared: bool


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP: `counts` of each layer, 0 where it has its MLP.

    Each token goes to `per_token` of them, with the softmax of all logits as weights, which add up to 1 if
    `renormalize`. `shared_size`: width of an MLP that every token goes through besides, weighted by a sigmoid, or if
    `residual` against the experts' sum by a softmax of two; 0: none. `bias`: experts, that MLP and the two logits have
    biases.
    """

    counts: tuple[int, ...]
    per_token: int
    intermediate_size: int
    renormalize: bool
    shared_size: int = 0
    residual: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Patches:
    """Of an image: squares of `size` pixels each way, of one of `image_size` each way with so many channels."""

    image_size: int
    size: int
    channels: int

    @property
    def count(self) -> int:
        return (self.image_size // self.size) ** 2

    @property
    def values(self) -> int:
        """Of one patch."""
        return self.channels * self.size**2


@dataclass(frozen=True)
class Architecture:
    """One entry per layer: `ropes` (None: the layer does not turn) and `sliding_window` (how many tokens a query sees,
    itself included; None: all). `max_context` in tokens.

    norm_order, where a sub-layer's norm stands: "pre" before it; "post" over the stream after its output was added;
    "output" over its output; "sandwich" before it and over its output. `parallel`: attention and MLP read the same
    stream, through one norm or, with `parallel_norms`, through one each. `stream_of_norm`: the stream goes on with what
    the norm made of it. `norm_offset` is added to each norm's weight.

    alibi_slopes: one for each head. num_positions: rows of the table of learned positions, position p being row p +
    position_offset. causal: a token sees itself and those before it; otherwise all of its sequence, without a cache.
    patches: what an image is made of, behind a class token, the only one of its vocabulary.
    scales multiply: the embedding, each sub-layer's output, the logits; logit_cap as kernels/scale.py has it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    activation: Activation
    ropes: tuple[Rope | None, ...]
    sliding_window: tuple[int | None, ...]
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    tie_embeddings: bool = False
    lm_head: bool = True
    lm_head_bias: bool = False
    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norm_order: NormOrder = "pre"
    final_norm: bool = True
    parallel: bool = False
    parallel_norms: bool = False
    stream_of_norm: bool = False
    qk_norm: QkNorm | None = None
    qkv_clip: float | None = None
    attention_cap: float | None = None
    alibi_slopes: tuple[float, ...] = ()
    causal: bool = True
    num_positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    experts: Experts | None = None
    patches: Patches | None = None

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def up_size(self) -> int:
        """Outputs of the MLP's first projection: of gate and up in one, or of up alone."""
        return self.up_size_of(self.intermediate_size)

    def up_size_of(self, width: int) -> int:
        """Of an MLP of that width."""
        return (2 if self.gated else 1) * width

    def has_experts(self, layer: int) -> bool:
        return self.num_experts(layer) > 0

    def num_experts(self, layer: int) -> int:
        """0 where the layer has an MLP."""
        return self.experts.counts[layer] if self.experts else 0
