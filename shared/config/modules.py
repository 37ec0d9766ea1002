"""What the ragged engine's modules are told: DeepSpeed's names and defaults. Sizes are of one device. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shared.config.dtype import dtype_name
from shared.config.options import Options, Positive


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Dtype = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(dtype_name)]
Norm = Literal["layer_norm", "rms_norm"]
# geglu, reglu and siglu are gated: of two features, one is activated and multiplies the other
Activation = Annotated[Literal["gelu", "relu", "silu", "geglu", "reglu", "siglu", "identity"], BeforeValidator(_lower)]


class ModuleConfig(Options):
    max_tokens: Positive = Field(description="tokens of one forward at most")


class RotateHalfConfig(Options):
    use_trained_freqs: bool = Field(default=False, description="frequencies come with the weights; else by theta_base")
    theta_base: float = Field(default=10_000.0, gt=0, description="base of the frequencies")
    rotate_dim: Positive | None = Field(default=None, description="elements of a head that are rotated; default: all")


class SelfAttentionConfig(ModuleConfig):
    n_heads_q: Positive = Field(description="heads of queries")
    n_heads_kv: Positive = Field(description="heads of keys and values")
    head_size: Positive = Field(description="elements of a head")
    max_sequences: Positive = Field(description="sequences of one forward at most")
    scale_factor: float = Field(default=1.0, description="what scores are multiplied by")
    input_dtype: Dtype = Field(default="float16", description="of queries, keys and values")
    output_dtype: Dtype = Field(default="float16", description="of the result")
    masking_type: Literal["none", "causal", "local", "symmetric", "asymmetric"] = Field(
        default="causal", description="local: a window; symmetric: by key; asymmetric: by query and key"
    )
    masking_args: dict[str, Any] = Field(default_factory=dict, description="what the mask needs to know")
    positional_embedding_type: Literal["none", "rotate_half", "rotate_every_other", "alibi"] = Field(
        default="none", description="how scores depend on positions"
    )
    positional_embedding_config: RotateHalfConfig | None = Field(default=None, description="of rotate_half")


class LinearConfig(ModuleConfig):
    in_channels: Positive = Field(description="input features")
    out_channels: Positive = Field(description="output features, after a gated activation")
    activation: Activation = Field(default="identity", description="what is done to the result")
    input_dtype: Dtype = Field(default="float16", description="of what is multiplied")
    output_dtype: Dtype = Field(default="float16", description="of the result")


class NormConfig(ModuleConfig):
    type: Norm = Field(description="layer_norm or rms_norm")
    channels: Positive = Field(description="features of a row")
    residual_dtype: Dtype = Field(default="float16", description="of the residual, read and written")
    input_dtype: Dtype = Field(default="float16", description="of what is added to the residual")
    output_dtype: Dtype = Field(default="float16", description="of the result")
    eps: float = Field(default=1e-5, ge=0, description="what the variance is raised by")


class MoeModuleConfig(ModuleConfig):
    model_dim: Positive = Field(description="features of a row")
    intermediate_features: Positive = Field(description="input features of an expert's second linear")
    n_experts: Positive = Field(description="experts of the layer")
    top_k: Positive = Field(default=1, description="experts of a row")
    input_dtype: Dtype = Field(default="float16", description="of the rows")
    output_dtype: Dtype = Field(default="float16", description="of the result")
    activation: Activation = Field(default="identity", description="of an expert's first linear")
    normalize_scores: bool = Field(default=False, description="the scores of a row's experts are made to sum up to 1")


class EmbeddingsConfig(ModuleConfig):
    residual_dtype: Dtype = Field(default="float16", description="of the result")
    embedding_dim: Positive = Field(description="features of a row")
    positional_embedding: bool = Field(default=False, description="whether a table of positions is added")
    positional_offset: int = Field(default=0, ge=0, description="the row of that table that position 0 has")
    use_token_type: bool = Field(default=False, description="whether a table of token types is added")
    output_normalization: Norm | None = Field(default=None, description="norm of the result")


class UnembedConfig(ModuleConfig):
    dtype: Dtype = Field(default="float16", description="of rows, weight and logits")
    norm_type: Norm | None = Field(default=None, description="norm of the rows before they are multiplied")
    model_dim: Positive = Field(description="features of a row")
    max_sequences: Positive = Field(description="sequences of one forward at most")
    vocab_size: Positive = Field(description="tokens of the vocabulary")
