"""What the ragged engine is told: DeepSpeed's options of FastGen, by its names, aliases and defaults. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.config.dtype import dtype_name
from shared.config.options import Options, Positive


def _cache_dtype(value: Any) -> str:
    return dtype_name(value, "fp8")


class RaggedTensorParallelConfig(Options):
    tp_size: Positive = Field(default=1, description="devices that each layer is split over")


class MemoryConfig(Options):
    mode: Literal["reserve", "allocate"] = Field(default="reserve", description="what `size` is about")
    size: Positive = Field(
        default=1_000_000_000, description="reserve: bytes that the KV cache leaves free; allocate: its blocks"
    )


class StateManagerConfig(Options):
    max_tracked_sequences: Positive = Field(default=2048, description="sequences that hold blocks at once")
    max_ragged_batch_size: Positive = Field(default=768, description="tokens of one forward at most")
    max_ragged_sequence_count: Positive = Field(default=512, description="sequences of one forward at most")
    max_context: Positive = Field(default=8192, description="tokens of a sequence at most, prompt and output")
    memory_config: MemoryConfig = Field(default_factory=MemoryConfig, description="size of the KV cache")
    offload: bool = Field(default=False, description="blocks may go to the host's memory when others need their place")

    @model_validator(mode="after")
    def _contradictions(self) -> StateManagerConfig:
        for name in ("max_tracked_sequences", "max_ragged_batch_size"):
            if self.max_ragged_sequence_count > getattr(self, name):
                raise ValueError(
                    f"max_ragged_sequence_count: {self.max_ragged_sequence_count} exceeds {name} "
                    f"({getattr(self, name)}); lower the one or raise the other"
                )
        return self


class KvCacheConfig(Options):
    type: Literal["dense", "local"] = Field(default="dense", description="local: of layers that see a window alone")
    block_size: Positive = Field(default=128, description="tokens in a block, a power of two")
    num_allocation_groups: Positive = Field(default=1, description="groups of layers that have blocks of their own")
    cache_shape: tuple[Positive, Positive, Positive] = Field(
        description="layers of a group, heads of keys and values, elements of a head"
    )
    cache_dtype: Annotated[Literal["float16", "bfloat16", "float32", "int8", "fp8"], BeforeValidator(_cache_dtype)] = (
        Field(default="float16", description="what keys and values are kept as")
    )
    max_blocks_per_allocation_group: Positive = Field(default=64, description="blocks of a sequence in a group at most")

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"{value} is not a power of two; use 16, 32, 64 or 128")
        return value


class RaggedQuantizationConfig(Options):
    quantization_mode: str | None = Field(default=None, description="wf6af16: weights in FP6, activations in float16")

    @field_validator("quantization_mode")
    @classmethod
    def _known(cls, mode: str | None) -> str | None:
        if mode not in (None, "wf6af16"):
            raise ValueError(f"Unsupported quantization mode: {mode}; wf6af16 is the one there is")
        return mode


class RaggedEngineConfig(Options):
    if TYPE_CHECKING:  # a type checker takes the alias for the only name, and asks for objects as sections

        def __init__(self, *, strict: bool = False, **values: Any) -> None: ...

    tensor_parallel: RaggedTensorParallelConfig = Field(
        default_factory=RaggedTensorParallelConfig, alias="tp", description="how layers are split over devices"
    )
    state_manager: StateManagerConfig = Field(
        default_factory=StateManagerConfig, alias="manager", description="limits of sequences, batches and memory"
    )
    quantization: RaggedQuantizationConfig = Field(
        default_factory=RaggedQuantizationConfig, description="what the weights of linears are kept as"
    )
