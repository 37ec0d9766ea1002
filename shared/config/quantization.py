"""DeepSpeed's quantization options: `quant` of InferenceConfig.

Three things turn it on, one of them at a time: dtype int8, which quantizes every linear as `weight` says,
weight.quantized_initialization and weight.post_init_quant. `enabled` alone turns nothing on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config.options import Options, Positive, only


class GroupQuantConfig(Options):
    """What `quantized_initialization` is, and each of `post_init_quant`."""

    num_bits: Literal[4, 8] = Field(default=8, description="bits of an integer")
    group_size: Positive | None = Field(default=None, description="input features that share a scale; none: all")
    group_dim: Annotated[int, only(1, "a scale is for input features of one row; leave it out")] = Field(
        default=1, description="1"
    )
    symmetric: bool = Field(default=False, description="false: a group has an offset beside its scale")


class ActivationQuantConfig(Options):
    """Of the rows that a linear multiplies."""

    enabled: bool = Field(default=True, description="false: they stay as they are; true turns nothing on by itself")
    num_bits: Annotated[int, only(8, "rows become int8; leave it out")] = Field(default=8, description="8")
    q_type: Annotated[str, only("symmetric", "rows become int8 around zero; leave it out")] = Field(
        default="symmetric", description="symmetric"
    )
    q_groups: Annotated[int, only(1, "a row has one scale; leave it out")] = Field(default=1, description="1")
    dynamic: bool = Field(
        default=False, description="with dtype int8: rows become int8 as they come, each with a scale of its own"
    )


class WeightQuantConfig(Options):
    """Of the linears' weights."""

    enabled: bool = Field(default=True, description="false: they stay as they are; true turns nothing on by itself")
    num_bits: Literal[4, 6, 8] = Field(default=8, description="with dtype int8: bits of a number, 6 of a float's alone")
    q_type: Literal["symmetric", "asymmetric", "float"] = Field(
        default="symmetric",
        description="with dtype int8: asymmetric: a group has an offset beside its scale; float: e4m3 of 8 bits, e3m2 "
        "of 6",
    )
    q_groups: Positive = Field(default=1, description="with dtype int8: groups that each row of a weight is cut into")
    quantized_initialization: dict[str, Any] = Field(
        default_factory=dict, description="quantize every linear while the model is made: num_bits, group_size, ..."
    )
    post_init_quant: dict[Annotated[str, Field(min_length=1)], GroupQuantConfig] = Field(
        default_factory=dict, description="quantize the parameters whose names hold a key: {key: {num_bits, ...}}"
    )

    @field_validator("quantized_initialization")
    @classmethod
    def _of_all(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value:
            GroupQuantConfig.of(value)
        return value

    @model_validator(mode="after")
    def _is_a_form(self) -> WeightQuantConfig:
        if (self.num_bits, self.q_type == "float") not in ((4, False), (8, False), (8, True), (6, True)):
            raise ValueError(
                f"num_bits: {self.num_bits}, and q_type is {self.q_type}: integers have 4 or 8 bits, floats 6 or 8"
            )
        return self

    @property
    def is_default(self) -> bool:
        """Whether dtype int8 is nothing but int8, a scale for each row."""
        return (self.num_bits, self.q_type, self.q_groups) == (8, "symmetric", 1)


class QkvQuantConfig(Options):
    """Of the projection to queries, keys and values."""

    enabled: bool = Field(
        default=True, description="false: it stays as it is, whatever else is said; true turns nothing on by itself"
    )


class QuantizationConfig(Options):
    enabled: bool = Field(default=True, description="false: nothing is quantized; true turns nothing on by itself")
    activation: ActivationQuantConfig = Field(
        default_factory=ActivationQuantConfig, description="of the rows that a linear multiplies"
    )
    weight: WeightQuantConfig = Field(default_factory=WeightQuantConfig, description="of the linears' weights")
    qkv: QkvQuantConfig = Field(
        default_factory=QkvQuantConfig, description="of the projection to queries, keys and values"
    )

    def check(self, dtype: str) -> None:
        """Raises ValueError for what contradicts itself, or the dtype."""
        weight, activation = self.weight, self.activation
        ways = ("quantized_initialization", "post_init_quant")
        on = [f"quant.weight.{name}" for name in ways if getattr(weight, name)]
        on += ["dtype int8"] if dtype == "int8" else []
        if len(on) > 1:
            raise ValueError(f"{on[0]}: given, and so is {on[1]}; each says how weights are quantized: leave one out")
        if on and not (self.enabled and weight.enabled):
            section = "quant.weight" if self.enabled else "quant"
            told = "dtype is int8" if dtype == "int8" else f"{on[0]} is given"
            raise ValueError(f"{section}.enabled: false, and {told}; leave it out, or the other")
        if dtype == "int8":
            if activation.dynamic and not activation.enabled:
                raise ValueError("quant.activation.dynamic: true, and enabled is false; leave one of them out")
            if activation.dynamic and not weight.is_default:
                raise ValueError(
                    "quant.activation.dynamic: true, and quant.weight is not int8, symmetric, with a scale for each "
                    "row: int8 rows are multiplied with such weights alone; leave one of them out"
                )
            return
        if activation.dynamic:
            raise ValueError(f"quant.activation.dynamic: true, and dtype is {dtype}; give dtype int8, or leave it out")
        if not weight.is_default:
            raise ValueError(
                f"quant.weight: {weight.num_bits} bits, {weight.q_type}, q_groups {weight.q_groups}, and dtype is "
                f"{dtype}, which quantizes nothing by it; give dtype int8, or leave it out"
            )
