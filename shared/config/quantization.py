"""DeepSpeed's quantization options: `quant` of InferenceConfig."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shared.config.options import Options, Positive


class QuantConfig(Options):
    enabled: bool = Field(default=True, description="false: these stay as they are; true turns nothing on by itself")
    num_bits: Literal[4, 8] = Field(default=8, description="bits of an integer")
    q_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="asymmetric: a group has an offset beside its scale"
    )
    q_groups: Positive = Field(default=1, description="groups that each row of a weight is cut into")


class ActivationQuantConfig(QuantConfig):
    """Of the rows that a linear multiplies."""


class WeightQuantConfig(QuantConfig):
    """Of the linears' weights."""

    quantized_initialization: dict[str, Any] = Field(
        default_factory=dict, description="quantize every linear while the model is made: num_bits, group_size, ..."
    )
    post_init_quant: dict[str, Any] = Field(
        default_factory=dict, description="quantize the parameters whose names hold a key: {key: {num_bits, ...}}"
    )


class QkvQuantConfig(Options):
    """Of the projection to queries, keys and values."""

    enabled: bool = Field(default=True, description="false: it stays as it is; true turns nothing on by itself")


class QuantizationConfig(Options):
    enabled: bool = Field(default=True, description="false: nothing is quantized; true turns nothing on by itself")
    activation: ActivationQuantConfig = Field(
        default_factory=ActivationQuantConfig, description="of the rows that a linear multiplies"
    )
    weight: WeightQuantConfig = Field(default_factory=WeightQuantConfig, description="of the linears' weights")
    qkv: QkvQuantConfig = Field(
        default_factory=QkvQuantConfig, description="of the projection to queries, keys and values"
    )
