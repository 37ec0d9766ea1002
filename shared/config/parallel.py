"""How DeepSpeed's options say that a model is split over devices: `tensor_parallel` and `moe` of InferenceConfig."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from shared.config.options import Options, Positive

_GROUPS = tuple(f"get_{kind}_parallel_{what}" for kind in ("model", "data") for what in ("rank", "group", "world_size"))


class TensorParallelConfig(Options):
    """Of each layer."""

    enabled: bool = Field(default=True, description="false: nothing is split; true splits nothing by itself")
    tp_size: Positive = Field(default=1, description="devices that each layer is split over")
    tp_grain_size: Positive = Field(default=64, description="features that stay together when a layer is split")
    mpu: Any = Field(default=None, description=f"an object that knows the groups, by {', '.join(_GROUPS)}")
    tp_group: Any = Field(default=None, description="torch.distributed process group of the devices")

    @field_validator("mpu")
    @classmethod
    def _knows_groups(cls, mpu: Any) -> Any:
        missing = [name for name in _GROUPS if not callable(getattr(mpu, name, None))]
        if mpu is not None and missing:
            raise ValueError(f"{type(mpu).__name__} has no {', '.join(missing)}")
        return mpu

    @property
    def group_field(self) -> str:
        """Which field says the process group."""
        return "tensor_parallel.mpu" if self.mpu is not None else "tensor_parallel.tp_group"

    @property
    def process_group(self) -> Any:
        """That of mpu or tp_group; None where neither is said."""
        return self.tp_group if self.mpu is None else self.mpu.get_model_parallel_group()

    @model_validator(mode="after")
    def _contradictions(self) -> TensorParallelConfig:
        size = self._group_size()
        if size is not None:
            if "tp_size" in self.model_fields_set and self.tp_size != size:
                raise ValueError(f"tp_size: {self.tp_size}, and the group has {size} ranks; leave one of them out")
            vars(self)["tp_size"] = size  # past __setattr__: it was not given
        if not self.enabled and self.tp_size > 1:
            raise ValueError(f"enabled: false, and tp_size is {self.tp_size}; leave one of them out")
        return self

    def _group_size(self) -> int | None:
        if self.mpu is not None and self.tp_group is not None:
            raise ValueError("mpu: has a group, and tp_group is another; leave one of them out")
        if self.mpu is not None:
            return int(self.mpu.get_model_parallel_world_size())
        if self.tp_group is None:
            return None
        size = getattr(self.tp_group, "size", None)
        if not callable(size):
            raise ValueError(f"tp_group: wants a torch.distributed process group, has {type(self.tp_group).__name__}")
        return int(cast(int, size()))


class MoeConfig(Options):
    """Of the experts. `True` and `False` are short for `enabled` alone."""

    enabled: bool = Field(default=True, description="false: the model has no experts; true gives it none")
    ep_size: Positive = Field(default=1, description="devices that the experts are split over")
    moe_experts: list[Positive] = Field(
        default_factory=lambda: [1], min_length=1, alias="num_experts", description="experts of each layer of experts"
    )
    type: Literal["standard", "residual"] = Field(
        default="standard", description="residual: a dense MLP's output is added to the experts'"
    )
    ep_mp_group: Any = Field(default=None, description="process group of the devices that share an expert")
    ep_group: Any = Field(
        default=None, alias="expert_group", description="process group that the experts are split over"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_flag(cls, data: Any) -> Any:
        return {"enabled": data} if isinstance(data, bool) else data

    @classmethod
    def _given_in(cls, value: Any) -> dict[str, Any] | None:
        return {"enabled": value} if isinstance(value, bool) else super()._given_in(value)

    @model_validator(mode="after")
    def _contradictions(self) -> MoeConfig:
        if not self.enabled and self.ep_size > 1:
            raise ValueError(f"enabled: false, and ep_size is {self.ep_size}; leave one of them out")
        return self
