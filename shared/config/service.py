"""The configuration of every process: one `tandem.yaml`, then the environment, then flags, read once and frozen.

    config = load_config(path="tandem.yaml", overrides={"decode": {"max_running": 8}})

The environment uses `TANDEM_` and `__` between levels: `TANDEM_DECODE__MAX_RUNNING=8`. Unknown keys, values out of
range and contradictions are refused with the field's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_PATH = Path("tandem.yaml")


def _split(value: object) -> object:
    """`a:1,b:2`, as the environment and flags write a list."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _check_target(value: str) -> str:
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host.strip("[]") or (":" in host) != bracketed or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("is not host:port; an IPv6 address stands in brackets: [::1]:50071")
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Ranks = Annotated[int, Field(ge=1, le=64)]
Seconds = Annotated[float, Field(gt=0)]
QuantizationMode = Literal["none", "int8", "int8_dynamic", "int4", "fp8", "fp6"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Target = Annotated[str, AfterValidator(_check_target)]
Patterns = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Targets = Annotated[tuple[Target, ...], NoDecode, BeforeValidator(_split)]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names each field and what is wrong with it."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class GatewayConfig(Section):
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: Port = Field(default=50051, description="gRPC port, 0 = any free one")
    http_port: Port = Field(default=8080, description="OpenAI HTTP port, 0 = any free one")
    prefill_workers: Targets = Field(
        default=("127.0.0.1:50061",), description="host:port of each prefill worker, or of all that share a DNS name"
    )
    decode_workers: Targets = Field(
        default=("127.0.0.1:50071",), description="host:port of each decode worker, or of all that share a DNS name"
    )
    max_running: Positive = Field(default=256, description="requests in progress at once")
    max_queued: int = Field(
        default=512, ge=0, description="requests waiting for a place; one more is RESOURCE_EXHAUSTED"
    )
    default_deadline_s: Seconds = Field(
        default=600.0, description="budget of a request whose client sets no deadline, seconds"
    )
    resume_window_s: float = Field(
        default=30.0,
        ge=0,
        description="how long a request with a request_id outlives its connection or its end, seconds",
    )
    local_prefill_tokens: int = Field(
        default=0, ge=0, description="prompts of up to this many tokens are prefilled by the decode worker; 0 = none"
    )
    max_attempts: Positive = Field(default=4, description="handoffs tried for a request before it is UNAVAILABLE")
    recovery_wait_s: float = Field(
        default=30.0, ge=0, description="how long a request that lost its decode worker waits for another, seconds"
    )
    max_message_bytes: Positive = Field(default=16 << 20, description="largest message accepted, bytes")


class PrefillConfig(Section):
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on, and the one told to decode workers; 0.0.0.0 or :: = all, "
        "and told is that of this host's name",
    )
    port: Port = Field(default=50061, description="gRPC port, 0 = any free one")
    tp: Ranks | None = Field(default=None, description="tp of these workers; default: the common one")
    kv_memory_mib: Positive = Field(default=256, description="size of the KV pool, MiB; of several, of all together")
    num_blocks: Positive | None = Field(
        default=None, description="size of the KV pool in blocks, instead of kv_memory_mib"
    )
    kv_dtype: KvDtype | None = Field(default=None, description="kv_dtype of these workers; default: the common one")
    block_tokens: Positive | None = Field(
        default=None, description="block_tokens of these workers; default: the common one"
    )
    chunk_tokens: Positive = Field(default=512, description="tokens of one prompt computed in one step at most")
    batch_tokens: Positive = Field(default=512, description="tokens of all prompts computed in one step at most")
    max_running: Positive = Field(default=64, description="prompts that hold blocks at once")
    max_waiting: int = Field(
        default=256, ge=0, description="prompts waiting for blocks; one more is RESOURCE_EXHAUSTED"
    )
    prefix_cache: bool = Field(
        default=True, description="keep the blocks of finished prompts for prompts that begin alike"
    )


class DecodeConfig(Section):
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: Port = Field(default=50071, description="gRPC port, 0 = any free one")
    tp: Ranks | None = Field(default=None, description="tp of these workers; default: the common one")
    kv_memory_mib: Positive = Field(default=512, description="size of the KV pool, MiB; of several, of all together")
    num_blocks: Positive | None = Field(
        default=None, description="size of the KV pool in blocks, instead of kv_memory_mib"
    )
    kv_dtype: KvDtype | None = Field(default=None, description="kv_dtype of these workers; default: the common one")
    block_tokens: Positive | None = Field(
        default=None, description="block_tokens of these workers; default: the common one"
    )
    max_running: Positive = Field(default=64, description="sequences in one step at most")
    max_waiting: int = Field(
        default=256, ge=0, description="requests waiting for blocks; one more is RESOURCE_EXHAUSTED"
    )
    chunk_tokens: Positive = Field(default=256, description="prompt tokens computed in one step when prefilling here")
    batch_tokens: Positive | None = Field(
        default=None,
        description="tokens in one step: one of each running sequence, all others of prompts; default: chunk_tokens "
        "of prompts, however many sequences run",
    )
    prefix_cache: bool = Field(
        default=True, description="keep the blocks of finished requests for prompts that begin alike"
    )
    max_pause_s: float = Field(
        default=0.1,
        ge=0,
        description="how long a step waits at most for prompts that prefill workers compute on the same cores, seconds",
    )
    preemption: Literal["swap", "recompute"] = Field(
        default="swap", description="what becomes of a sequence's blocks when others need them"
    )
    swap_memory_mib: int = Field(
        default=256, ge=0, description="host memory for swapped blocks, MiB; beyond it: recompute"
    )


class TransportConfig(Section):
    require: Literal["cuda_ipc", "shared_memory", "inline"] | None = Field(
        default=None, description="refuse to start, and to import, on a transport below this one"
    )
    disable: Annotated[tuple[Literal["cuda_ipc", "shared_memory"], ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="transports not to use"
    )
    cuda_export: Literal["descriptor", "handle"] = Field(
        default="descriptor",
        description="how decode workers reach a pool on a GPU: by a file descriptor that crosses the socket, or by "
        "cudaIpcMemHandle, which asks for shared PID and IPC namespaces",
    )
    convert_dtype: bool = Field(
        default=False,
        description="decode takes KV of another dtype and converts it; a stream that lost its worker may then go on "
        "with other tokens than it would have had",
    )
    checksum: bool = Field(default=False, description="send and check a CRC-32 of every extent")
    socket_dir: Path | None = Field(
        default=None,
        description="folder of the unix sockets, which workers in separate containers share; default: a private one",
    )


class ApiKey(Section):
    name: str = Field(description="whose key it is; stands in logs and errors")
    key: SecretStr = Field(description="the secret that the client sends as `authorization: Bearer <key>`")
    models: tuple[str, ...] = Field(default=(), description="served names it may use; empty = all")
    max_running: Positive | None = Field(default=None, description="requests in progress at once; default: no quota")


class AuthConfig(Section):
    api_keys: tuple[ApiKey, ...] = Field(default=(), description="keys of clients; empty = open to all")
    cluster_key: SecretStr | None = Field(
        default=None, description="key that the gateway and the workers share; default: none is asked for"
    )


class UpConfig(Section):
    prefill: int = Field(default=1, ge=0, description="prefill workers started by `tandem up`")
    decode: Positive = Field(default=1, description="decode workers started by `tandem up`")


class TandemConfig(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TANDEM_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    model: str = Field(default=DEFAULT_MODEL, description="built-in name, Hugging Face id, folder or .gguf file")
    served_name: str | None = Field(
        default=None, description="name that clients use; default: the last part of `model`"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the engine runs; auto = cpu: cuda has not run on a GPU yet"
    )
    deterministic: bool = Field(
        default=True,
        description="on cuda: a token's bits are its own, whatever is computed beside it; on cpu they always are; "
        "and ranks compute the bits of one process",
    )
    enable_cuda_graph: bool = Field(
        default=True, description="on cuda: decode steps are captured once and replayed; false = op by op"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto = bfloat16")
    quantization: QuantizationMode = Field(
        default="none",
        description="what the linears' weights are kept as, with a scale for each row, int4 in groups of 32; "
        "int8_dynamic: the rows that they multiply become int8 too",
    )
    quantization_exclude: Patterns = Field(
        default=(), description="weights that stay as they are, by patterns such as layers.0.*, *.down, lm_head"
    )
    block_tokens: Positive = Field(default=16, description="tokens in a KV block, a power of two")
    kv_dtype: KvDtype = Field(
        default="auto",
        description="what keys and values are kept as; auto = as dtype; int8 and fp8 take half the memory of bfloat16",
    )
    max_context: Positive | None = Field(
        default=None, description="tokens of prompt and output; default: the model's own"
    )
    tp: Ranks = Field(
        default=1,
        description="processes that compute a worker's model in parallel, each with a slice of its heads; on cuda "
        "each on a GPU of its own",
    )
    threads: Positive | None = Field(
        default=None, description="CPU threads of each worker, all its ranks together; default: all cores"
    )
    allow_pickle: bool = Field(
        default=False, description="accept pickle checkpoints (.bin, .pt), read with weights_only"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line logged"
    )
    drain_s: float = Field(
        default=5.0, ge=0, description="time that running requests have to finish at SIGTERM, seconds"
    )
    gateway: GatewayConfig = GatewayConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    transport: TransportConfig = TransportConfig()
    auth: AuthConfig = AuthConfig()
    up: UpConfig = UpConfig()

    @property
    def weights_dtype(self) -> str:
        """What weights and activations are."""
        return "bfloat16" if self.dtype == "auto" else self.dtype

    @property
    def weights_form(self) -> str:
        """What becomes of the model's files before they are computed with; `none` leaves them as they are."""
        if not self.quantization_exclude:
            return self.quantization
        return f"{self.quantization} without {','.join(sorted(set(self.quantization_exclude)))}"

    def kv_dtype_of(self, section: PrefillConfig | DecodeConfig) -> str:
        """What a role keeps keys and values as."""
        dtype = section.kv_dtype or self.kv_dtype
        return self.weights_dtype if dtype == "auto" else dtype

    def block_tokens_of(self, section: PrefillConfig | DecodeConfig) -> int:
        """Tokens in a KV block of a role."""
        return section.block_tokens or self.block_tokens

    def tp_of(self, section: PrefillConfig | DecodeConfig) -> int:
        """Ranks of a worker of a role."""
        return section.tp or self.tp

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_name or Path(self.model).name.removesuffix(".gguf")

    @model_validator(mode="after")
    def _contradictions(self) -> TandemConfig:
        for level, section in (("", self), ("prefill.", self.prefill), ("decode.", self.decode)):
            tokens = section.block_tokens
            if tokens is not None and tokens & (tokens - 1):
                raise ValueError(f"{level}block_tokens: {tokens} is not a power of two; use 16, 32, 64 or 128")
            if section.kv_dtype not in (None, "auto", "int8", "fp8", self.weights_dtype):
                raise ValueError(
                    f"{level}kv_dtype: {section.kv_dtype}, and dtype is {self.weights_dtype}: keys and values that are "
                    "not int8 or fp8 are kept as they are computed; use auto, or change one of the two"
                )
            if (section.tp or 1) > 1 and self.device == "cuda" and self.transport.cuda_export == "handle":
                raise ValueError(
                    f"transport.cuda_export: handle, and {level}tp is {section.tp}: ranks map their pools by "
                    "descriptor, so that is the way for other workers too; use descriptor"
                )
        if self.quantization_exclude and self.quantization == "none":
            raise ValueError(
                f"quantization_exclude: {','.join(self.quantization_exclude)}, and quantization is none: there is "
                "nothing to leave out; remove it, or set quantization"
            )
        if self.transport.require in self.transport.disable:
            raise ValueError(
                f"transport.require: {self.transport.require} is also in transport.disable; remove it from one of them"
            )
        if not self.gateway.decode_workers:
            raise ValueError("gateway.decode_workers: empty; name at least one decode worker as host:port")
        if self.prefill.chunk_tokens > self.prefill.batch_tokens:
            raise ValueError(
                f"prefill.chunk_tokens: {self.prefill.chunk_tokens} exceeds prefill.batch_tokens "
                f"({self.prefill.batch_tokens}); lower the one or raise the other"
            )
        if self.decode.batch_tokens is not None and self.decode.batch_tokens <= self.decode.max_running:
            raise ValueError(
                f"decode.batch_tokens: {self.decode.batch_tokens} leaves no token to prompts beside decode.max_running "
                f"({self.decode.max_running}) sequences; raise the one or lower the other"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags win over the environment, the environment over the file."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> TandemConfig:
    """Reads the configuration.

    path: a YAML file; default: `tandem.yaml` in the working folder, if there is one.
    overrides: nested values from flags; they win over the environment and the file.
    Raises ConfigError that names every field at fault.
    """
    if path is not None and not path.is_file():
        raise ConfigError(f"{path}: no such file")
    source = path or (DEFAULT_PATH if DEFAULT_PATH.is_file() else None)

    class FromFile(TandemConfig):
        model_config = SettingsConfigDict(yaml_file=source, title="TandemConfig")

    try:
        # through the base class, so that every process compares and prints the same type
        return TandemConfig.model_construct(**_values(FromFile(**(overrides or {}))))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(e) for e in error.errors())) from None
    except SettingsError as error:  # a value of the environment that is no JSON where a section belongs
        raise ConfigError(str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from None


def _values(config: TandemConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TandemConfig.model_fields}


def _describe(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown key; `tandem config` lists the known ones"
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message} (got {error['input']!r})" if field else message
