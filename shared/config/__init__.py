"""Every configuration: the service's (service.py), and the engine's options by DeepSpeed's names (the other files)."""

from importlib import import_module
from typing import TYPE_CHECKING

from shared.config.parallel import MoeConfig, TensorParallelConfig
from shared.config.quantization import (
    ActivationQuantConfig,
    GroupQuantConfig,
    QkvQuantConfig,
    QuantizationConfig,
    WeightQuantConfig,
)
from shared.config.ragged import (
    KvCacheConfig,
    MemoryConfig,
    RaggedEngineConfig,
    RaggedQuantizationConfig,
    RaggedTensorParallelConfig,
    StateManagerConfig,
)
from shared.config.service import (
    DEFAULT_MODEL,
    ApiKey,
    AuthConfig,
    ConfigError,
    DecodeConfig,
    GatewayConfig,
    KvDtype,
    PrefillConfig,
    QuantizationMode,
    TandemConfig,
    TransportConfig,
    UpConfig,
    load_config,
)

if TYPE_CHECKING:
    from shared.config.inference import CheckpointConfig, InferenceConfig

__all__ = [
    "DEFAULT_MODEL",
    "ActivationQuantConfig",
    "ApiKey",
    "AuthConfig",
    "CheckpointConfig",
    "ConfigError",
    "DecodeConfig",
    "GatewayConfig",
    "GroupQuantConfig",
    "InferenceConfig",
    "KvCacheConfig",
    "KvDtype",
    "MemoryConfig",
    "MoeConfig",
    "PrefillConfig",
    "QkvQuantConfig",
    "QuantizationConfig",
    "QuantizationMode",
    "RaggedEngineConfig",
    "RaggedQuantizationConfig",
    "RaggedTensorParallelConfig",
    "StateManagerConfig",
    "TandemConfig",
    "TensorParallelConfig",
    "TransportConfig",
    "UpConfig",
    "WeightQuantConfig",
    "load_config",
]


def __getattr__(name: str) -> object:
    # A field of InferenceConfig is a torch.dtype; the gateway imports this package and never loads torch.
    if name in ("CheckpointConfig", "InferenceConfig"):
        return getattr(import_module("shared.config.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
