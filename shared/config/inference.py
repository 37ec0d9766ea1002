"""What `init_inference` is told: DeepSpeed's options by its names, aliases and defaults.

    config = InferenceConfig.of("options.json", dtype="bf16", max_tokens=2048)
    config.check_supported()

A value that the engine could only ignore is refused, and so are two values that contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import (
    Field,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from kernels.device import INTERPRETED
from shared.config.dtype import dtype_name
from shared.config.options import Deprecated, Options, Positive, only
from shared.config.parallel import MoeConfig, TensorParallelConfig
from shared.config.quantization import QuantizationConfig
from shared.policies.policy import Policy


class CheckpointConfig(Options):
    """Another place for three fields of InferenceConfig, which tell the same once they are read; and how to read."""

    checkpoint_dir: str | None = Field(default=None, description="as `checkpoint`")
    save_mp_checkpoint_path: str | None = Field(default=None, description="as `save_mp_checkpoint_path`")
    base_dir: str | None = Field(default=None, description="as `base_dir`")
    tag: str | None = Field(
        default=None, description="which checkpoint of a training folder; by default the one that `latest` names"
    )
    allow_pickle: bool = Field(
        default=False, description="read pickle too, by weights_only=True; without it only files that cannot run code"
    )


class InferenceConfig(Options):
    deprecated: ClassVar[Mapping[str, Deprecated]] = {
        "mp_size": Deprecated("tensor_parallel.tp_size"),
        "mpu": Deprecated("tensor_parallel.mpu"),
        "ep_size": Deprecated("moe.ep_size"),
        "ep_group": Deprecated("moe.ep_group", alias="expert_group"),
        "ep_mp_group": Deprecated("moe.ep_mp_group", alias="expert_mp_group"),
        "moe_experts": Deprecated("moe.moe_experts"),
        "moe_type": Deprecated("moe.type"),
        "replace_method": Deprecated(),
    }

    if TYPE_CHECKING:  # a type checker takes the alias for the only name, and asks for objects as sections

        def __init__(self, *, strict: bool = False, **values: Any) -> None: ...

    replace_with_kernel_inject: bool = Field(
        default=False, alias="kernel_inject", description="replace the model's layers by the engine's, fused ones"
    )
    dtype: torch.dtype = Field(
        default=torch.float16,
        description="of weights and activations, a torch.dtype or a name of it; int8: linears' weights by `quant`",
    )
    tensor_parallel: TensorParallelConfig = Field(
        default_factory=TensorParallelConfig, alias="tp", description="how layers are split over devices"
    )
    enable_cuda_graph: bool = Field(default=False, description="capture a forward once and replay it")
    use_triton: bool = Field(
        default=False, description="refuse to run where Triton's kernels cannot; on CUDA they are taken anyway"
    )
    triton_autotune: Annotated[
        bool, only(False, "tiles are fixed, as other tiles would give other bits; leave it out")
    ] = Field(default=False, description="false")
    zero: Annotated[
        dict[str, Any], only({}, "ZeRO splits the state of a training, and there is none here; leave it out")
    ] = Field(default_factory=dict, description="empty")
    triangular_masking: bool = Field(
        default=True, alias="tm", description="a token attends to no later one; false for a decoder is refused"
    )
    moe: MoeConfig = Field(default_factory=MoeConfig, description="how experts are split over devices; true or false")
    keep_module_on_host: bool = Field(default=False, description="leave the weights in the host's memory")
    quant: QuantizationConfig = Field(default_factory=QuantizationConfig, description="what is quantized, and how")
    checkpoint: str | dict[str, Any] | None = Field(
        default=None, description="path of a checkpoint or of its JSON description, or the description itself"
    )
    base_dir: str = Field(default="", description="folder that the names in the checkpoint's description start from")
    set_empty_params: bool = Field(default=False, description="weights are left on the meta device, nothing is loaded")
    save_mp_checkpoint_path: str | None = Field(
        default=None, description="folder that the loaded weights are written to, each device's in files of its own"
    )
    checkpoint_config: CheckpointConfig = Field(
        default_factory=CheckpointConfig, alias="ckpt_config", description="another place for the three above"
    )
    return_tuple: Annotated[
        bool, only(True, "forward returns the model's own type, and layers return to none but it; leave it out")
    ] = Field(default=True, description="true")
    training_mp_size: Annotated[
        int, only(1, "a checkpoint's files tell the degree that they were written for; leave it out")
    ] = Field(default=1, description="1")
    injection_policy: Policy | dict[type[torch.nn.Module], tuple[str, ...]] | None = Field(
        default=None,
        alias="injection_dict",
        description="{module class: suffixes of its linears whose outputs are summed over devices}, or a Policy",
    )
    injection_policy_tuple: Annotated[
        tuple[str, ...] | None, only(None, "the engine reads the suffixes from injection_policy; give them there")
    ] = Field(default=None, description="none")
    config: dict[str, Any] | None = Field(
        default=None, alias="args", description="fields of the model's own config to be other than it says"
    )
    max_out_tokens: Positive = Field(
        default=1024, alias="max_tokens", description="tokens of prompt and output together, at most"
    )
    min_out_tokens: Positive = Field(
        default=1, alias="min_tokens", description="tokens that there must be memory for, or the engine does not start"
    )
    transposed_mode: Annotated[
        bool, only(False, "the policy of a model's family says how its weights lie; leave it out")
    ] = Field(default=False, alias="transposed_mode", description="false")

    def check_supported(self) -> None:
        """Raises ValueError for contradictions: a section's fields may have been set by themselves since."""
        self._settle()

    @field_validator("dtype", mode="before")
    @classmethod
    def _torch_dtype(cls, value: Any) -> torch.dtype:
        if not isinstance(value, str | torch.dtype):
            raise TypeError(f"Invalid type for dtype: {type(value)}")
        return getattr(torch, dtype_name(value))

    @field_serializer("dtype")
    def _dtype_text(self, dtype: torch.dtype) -> str:
        return str(dtype)

    @field_validator("use_triton")
    @classmethod
    def _triton_runs(cls, value: bool) -> bool:
        if value and find_spec("triton") is None:
            raise ValueError("Triton needs to be installed to use its kernels: pip install triton, or leave it out")
        if value and not INTERPRETED and not torch.cuda.is_available():
            raise ValueError(
                "there is no CUDA device to run Triton's kernels; leave it out, or have them interpreted by the "
                "environment's TRITON_INTERPRET=1"
            )
        return value

    @field_validator("injection_policy", mode="plain")
    @classmethod
    def _suffixes(cls, value: Any) -> Policy | dict[type[torch.nn.Module], tuple[str, ...]] | None:
        if value is None or isinstance(value, Policy):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"wants {{module class: suffixes}} or a Policy, has {type(value).__name__}")
        suffixes = dict[type[torch.nn.Module], tuple[str, ...]]()
        for kind, names in value.items():
            if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
                raise ValueError(f"{kind!r} is no subclass of torch.nn.Module; give the class whose layers are meant")
            given = (names,) if isinstance(names, str) else names
            if not isinstance(given, list | tuple) or not given or not all(n and isinstance(n, str) for n in given):
                raise ValueError(f"{kind.__name__}: wants the suffix of a layer's name or several, has {names!r}")
            suffixes[kind] = tuple(given)
        return suffixes

    @field_serializer("injection_policy")
    def _plain_policy(self, policy: Any, info: SerializationInfo) -> Any:
        if policy is not None and (info.mode_is_json() or isinstance(policy, Policy)):
            raise ValueError(
                "injection_policy: a Policy is no plain data, and a class no JSON; exclude it from the dump"
            )
        return policy

    @model_validator(mode="after")
    def _settled(self) -> InferenceConfig:
        self._settle()
        return self

    def _settle(self) -> None:
        """Takes over what checkpoint_config says, and refuses contradictions."""
        for name, other in (
            ("checkpoint", "checkpoint_dir"),
            ("save_mp_checkpoint_path", "save_mp_checkpoint_path"),
            ("base_dir", "base_dir"),
        ):
            value = getattr(self, name) if name in self.model_fields_set else None
            nested = getattr(self.checkpoint_config, other)
            if value and nested and value != nested:
                raise ValueError(
                    f"{name}: {value!r}, and checkpoint_config.{other} is {nested!r}; leave one of them out"
                )
            if nested:
                vars(self)[name] = nested  # past __setattr__: it was not given
        quant = self.quant
        sizes = {"tensor_parallel.tp_size": self.tensor_parallel.tp_size, "moe.ep_size": self.moe.ep_size}
        for name, size in sizes.items():
            if self.enable_cuda_graph and size > 1:
                raise ValueError(
                    f"enable_cuda_graph: Cuda graph is not supported for model parallelism, and {name} is {size}; "
                    "leave one of them out"
                )
        if self.replace_with_kernel_inject and isinstance(self.injection_policy, dict):
            raise ValueError(
                "injection_policy: names layers to split as they are, and replace_with_kernel_inject replaces them; "
                "leave one of them out, or give a Policy"
            )
        if self.min_out_tokens > self.max_out_tokens:
            raise ValueError(
                f"min_out_tokens: {self.min_out_tokens} exceeds max_out_tokens ({self.max_out_tokens}); lower the one "
                "or raise the other"
            )
        quant.check(str(self.dtype).removeprefix("torch."))
        if self.base_dir and self.checkpoint is None:
            raise ValueError(f"base_dir: {self.base_dir!r}, and no checkpoint has its files there; name it, too")
        if self.checkpoint_config.tag is not None and not isinstance(self.checkpoint, str):
            raise ValueError(
                f"checkpoint_config.tag: {self.checkpoint_config.tag!r}, and checkpoint is no folder; give the folder, "
                "or leave it out"
            )
        if self.set_empty_params:
            for name in ("checkpoint", "save_mp_checkpoint_path"):
                if getattr(self, name) is not None:
                    raise ValueError(f"set_empty_params: no weights are loaded, and {name} is set; leave one out")

    @classmethod
    def _meaning(cls, name: str, value: Any) -> Any:
        known = name == "dtype" and isinstance(value, str | torch.dtype)
        return cls._torch_dtype(value) if known else super()._meaning(name, value)
