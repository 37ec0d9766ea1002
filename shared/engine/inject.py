"""Chooses what takes a model's place: the engine's decoder or encoder with kernel injection, the model itself without.

model                          with kernel_inject               without
causal language model          causal_lm.py                     as it is, in the dtype and on the device asked for
encoder, with a head or two    encoder_model.py                 as it is, in the dtype and on the device asked for
a folder                       its weights are read one by one  as transformers loads it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.checkpoint import Checkpoint, open_any, open_checkpoint
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.config import InferenceConfig, QuantizationMode
from shared.engine.causal_lm import CausalLM, Limits
from shared.engine.encoder_model import EncoderModel, encoders_of, is_encoder
from shared.model_files import ModelFiles, find_weights, read_json
from shared.models.weights import DTYPES, load_weights
from shared.policies.policy import Policy, UnsupportedModelError
from shared.policies.table import policy_for


@dataclass
class Injection:
    """What a model became. `close` frees what belongs to the engine."""

    module: nn.Module
    close: Callable[[], None]
    causal_lm: CausalLM | None = None
    wants_graph: bool = False  # the module's whole forward is to be captured


def inject(model: Any, config: InferenceConfig) -> Injection:
    """Raises ValueError for what config and model make impossible, before weights are read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(model, str | Path):
        return _folder(Path(model), config, device)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: wants a model, a folder or a pipeline, has a {type(model).__name__}")
    _override(model, config)
    if not config.replace_with_kernel_inject:
        return _as_it_is(model, config, device)
    if encoders_of(model):
        return _encoders(model, config, device)
    policy = _policy(model, config)
    fields = _fields(model)
    checkpoint = open_any(config.checkpoint, base_dir=config.base_dir) if config.checkpoint else _in_memory(model)
    return _causal_lm(model, policy, fields, checkpoint, config, device)


def compute_dtype(config: InferenceConfig, device: str) -> tuple[torch.dtype, QuantizationMode]:
    """Of activations, and how weights are kept. Raises ValueError for a dtype that the device does not compute in."""
    if config.dtype == torch.int8:
        return torch.bfloat16, "int8"
    if config.dtype not in DTYPES.values():
        names = ", ".join([*DTYPES, "int8"])
        raise ValueError(f"dtype: Data type {config.dtype} is not supported by {device} accelerator; use {names}")
    return config.dtype, "none"


def _folder(folder: Path, config: InferenceConfig, device: str) -> Injection:
    from shared.engine.hugging_face import encoder_from_folder, model_from_folder, model_on_meta

    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json: it is no folder of a model")
    if is_encoder(read_json(folder / "config.json")):
        return inject(encoder_from_folder(folder), config)
    if not config.replace_with_kernel_inject:
        return _as_it_is(model_from_folder(folder, compute_dtype(config, device)[0]), config, device)
    model = model_on_meta(folder)
    _override(model, config)
    source = config.checkpoint or None
    if source is not None:
        checkpoint = open_any(source, base_dir=config.base_dir)
    else:
        checkpoint = open_checkpoint(ModelFiles(folder.name, folder, find_weights(folder), ""))
    return _causal_lm(model, _policy(model, config), read_json(folder / "config.json"), checkpoint, config, device)


def _fields(model: Any) -> dict[str, object]:
    """The model's own config, as config.json has it."""
    return model.config.to_dict()


def _override(model: nn.Module, config: InferenceConfig) -> None:
    """Fields of the model's own config, as the user wants them."""
    for name, value in (config.config or {}).items():
        setattr(model.config, name, value)


def _policy(model: nn.Module, config: InferenceConfig) -> Policy:
    if isinstance(config.injection_policy, Policy):
        return config.injection_policy
    if getattr(model, "config", None) is None:
        raise ValueError("model: has no config that says how it is made; give a Policy, or leave out kernel_inject")
    return policy_for(_fields(model))


def _in_memory(model: nn.Module) -> Checkpoint:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("checkpoint: the model's weights are on the meta device; say where they are")
    return StateDictCheckpoint({name: value.cpu() for name, value in model.state_dict().items()}, "the model")


def _as_it_is(model: nn.Module, config: InferenceConfig, device: str) -> Injection:
    dtype, mode = compute_dtype(config, device)
    if mode != "none":
        raise ValueError("dtype: int8 quantizes the engine's linears; set kernel_inject, or use another dtype")
    if isinstance(config.injection_policy, dict):
        _check_suffixes(model, config.injection_policy)
    model.eval().to(dtype)
    if not config.keep_module_on_host:
        model.to(device)
    return Injection(model, lambda: None, wants_graph=config.enable_cuda_graph)


def _check_suffixes(model: nn.Module, policy: dict[type[nn.Module], tuple[str, ...]]) -> None:
    for kind, suffixes in policy.items():
        names = [name for module in model.modules() if isinstance(module, kind) for name, _ in module.named_modules()]
        for suffix in suffixes:
            if not any(name.endswith(suffix) for name in names):
                raise ValueError(f"Injection policy layer'{suffix}' not valid.")


def _encoders(model: nn.Module, config: InferenceConfig, device: str) -> Injection:
    checkpoint = open_any(config.checkpoint, base_dir=config.base_dir) if config.checkpoint else None
    injected = EncoderModel(model, checkpoint, *compute_dtype(config, device), device)
    return Injection(injected.module, injected.close, wants_graph=config.enable_cuda_graph)


def _causal_lm(
    model: nn.Module,
    policy: Policy,
    fields: dict[str, object],
    checkpoint: Checkpoint,
    config: InferenceConfig,
    device: str,
) -> Injection:
    architecture = policy.architecture(fields)
    if policy.kind != "decoder" or not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedModelError("architectures", f"{type(model).__name__} is no causal language model")
    if not config.triangular_masking:
        raise ValueError("triangular_masking: false, and a decoder's tokens attend to no later ones; leave it out")
    dtype, quantization = compute_dtype(config, device)
    weights = load_weights(
        architecture, checkpoint, dtype=dtype, device=device, quantization=quantization, policy=policy
    )
    weights.probe()
    limits = Limits(config.max_out_tokens, config.min_out_tokens)
    injected = CausalLM(model, architecture, weights, limits, device=device, enable_cuda_graph=config.enable_cuda_graph)
    return Injection(injected.module, injected.close, injected)
