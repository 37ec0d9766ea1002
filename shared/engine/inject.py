"""Chooses what takes a model's place: the engine's decoder or encoder with kernel injection, the model itself without.

model                          with kernel_inject               without
causal language model          causal_lm.py                     as it is, in the dtype and on the device asked for
encoder, with a head or two    encoder_model.py                 as it is, in the dtype and on the device asked for
a folder                       its weights are read one by one  as transformers loads it
a diffusers pipeline           diffusion.py                     as it is, in the dtype and on the device asked for

On several ranks the decoder is split by the engine, and a model as it is by auto_tp.py.

Which policy: the one of the options, else that of the config's model_type, else one that is found by names and shapes
and held against the model's own answers (detection.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.dtypes import DTYPES
from shared.checkpoint import Checkpoint, UnsupportedCheckpointError
from shared.checkpoint.injected import is_injected
from shared.checkpoint.megatron import is_megatron
from shared.config import InferenceConfig
from shared.engine.auto_tp import Split
from shared.engine.causal_lm import CausalLM, Limits
from shared.engine.detection import detected
from shared.engine.diffusion import InjectedPipeline, is_pipeline
from shared.engine.encoder_model import EncoderModel, encoders_of, is_encoder
from shared.engine.expert_options import check_experts, fields_with_experts, policy_with_experts, refuse_experts
from shared.engine.given import Given, fields_of, given_module, load_into
from shared.engine.quant_options import QuantOptions, parameter_names
from shared.engine.quantized_model import quantized_model
from shared.engine.ranks import expert_groups_of, group_of, same_random_state
from shared.engine.saving import quantized_of, save
from shared.model_files import find_weights, read_json
from shared.models.architecture import Architecture
from shared.models.loading import load_weights
from shared.parallel.group import Group
from shared.parallel.sharding import Shard
from shared.policies.injected import as_injected
from shared.policies.megatron_gpt2 import MEGATRON_GPT2
from shared.policies.policy import Policy, UnsupportedModelError
from shared.policies.table import POLICIES


@dataclass
class Injection:
    """What a model became. `close` frees what belongs to the engine."""

    module: Any  # an nn.Module, or a pipeline
    close: Callable[[], None]
    causal_lm: CausalLM | None = None
    # has a function called after each layer, with its index, and before the first with -1; None: no more
    observe_layers: Callable[[Callable[[int], None] | None], None] | None = None
    pipeline: InjectedPipeline | None = None
    wants_graph: bool = False  # the module's whole forward is to be captured


def inject(model: Any, config: InferenceConfig) -> Injection:
    """Raises ValueError for what config and model make impossible, before weights are read."""
    on_host = config.keep_module_on_host or not torch.cuda.is_available()
    device = "cpu" if on_host else "cuda"
    group = group_of(config.tensor_parallel, device)
    injection = _injection(model, config, device, group)
    if group is not None:
        same_random_state(group)
    return injection


def _injection(model: Any, config: InferenceConfig, device: str, group: Group | None) -> Injection:
    if is_pipeline(model):
        refuse_experts(config.moe)
        if group is not None:
            raise ValueError(f"tensor_parallel.tp_size: {group.size}, and a pipeline is not split; leave it out")
        pipeline = InjectedPipeline(model, config, device=device, dtype=compute_dtype(config, device))
        return Injection(model, pipeline.close, pipeline=pipeline)
    if not isinstance(model, str | Path | nn.Module):
        raise ValueError(f"model: wants a model, a folder or a pipeline, has a {type(model).__name__}")
    if isinstance(model, str | Path) and is_encoder(_config_json(Path(model))):
        model = _encoder_folder(Path(model))
    if config.replace_with_kernel_inject:
        if isinstance(model, nn.Module) and encoders_of(model):
            refuse_experts(config.moe)
            return _encoders(given_module(model, config), config, device, group)
        given = _given_folder(Path(model), config) if isinstance(model, str | Path) else given_module(model, config)
        return _causal_lm(given, config, device, group)
    refuse_experts(config.moe)
    return _as_it_is(model, config, device, group)


def compute_dtype(config: InferenceConfig, device: str) -> torch.dtype:
    """Of activations, which int8 is not of. Raises ValueError for a dtype that the device does not compute in."""
    if config.dtype == torch.int8:
        return torch.bfloat16
    if config.dtype not in DTYPES.values():
        names = ", ".join([*DTYPES, "int8"])
        raise ValueError(f"dtype: Data type {config.dtype} is not supported by {device} accelerator; use {names}")
    return config.dtype


def _given_folder(folder: Path, config: InferenceConfig) -> Given:
    """Without its weights, unless they are needed to find a policy."""
    from shared.engine.hugging_face import model_on_meta

    written, overrides = _config_json(folder), config.config or {}
    return Given(model_on_meta(folder, written, overrides), {**written, **overrides}, folder)


def _config_json(folder: Path) -> dict[str, object]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json: it is no folder of a model")
    return read_json(folder / "config.json")


def _policy(given: Given, config: InferenceConfig) -> tuple[Policy, Given]:
    """With the model in memory where that took it."""
    if isinstance(config.injection_policy, Policy):
        return config.injection_policy, given
    if not given.fields:
        raise ValueError("model: has no config that says how it is made; give a Policy, or leave out kernel_inject")
    if str(given.fields.get("model_type")) in POLICIES:
        return POLICIES[str(given.fields["model_type"])], given
    given = _to_be_asked(given, config)
    return detected(given.module, given.fields, config.max_out_tokens), given


def _to_be_asked(given: Given, config: InferenceConfig) -> Given:
    """A model without a policy, in memory with the weights that it is to be served with."""
    from shared.engine.hugging_face import is_listed, model_from_folder

    unknown = f"{given.fields.get('model_type')!r} is none of {', '.join(sorted(POLICIES))}"
    if given.folder is not None:
        if not is_listed(given.fields):
            raise UnsupportedModelError(
                "model_type", f"{unknown}, and transformers has no class for it: give a policy by injection_policy"
            )
        pickle = config.checkpoint_config.allow_pickle
        module = model_from_folder(given.folder, torch.float32, config.config or {}, allow_pickle=pickle)
        given = Given(module, fields_of(module.config))
    elif given.is_meta:
        raise UnsupportedModelError(
            "model_type",
            f"{unknown}; its weights are on the meta device, so that it cannot be asked: give it in memory, or a "
            "policy by injection_policy",
        )
    if config.checkpoint is not None:
        load_into(given.module, given.checkpoint(config))
    return given


def _causal_lm(given: Given, config: InferenceConfig, device: str, group: Group | None) -> Injection:
    dtype = compute_dtype(config, device)
    if not config.triangular_masking:
        raise ValueError("triangular_masking: false, and a decoder's tokens attend to no later ones; leave it out")
    policy, given = _policy(given, config)
    policy = policy_with_experts(policy, config.moe)
    architecture = policy.architecture(fields_with_experts(policy, given.fields, config.moe))
    check_experts(architecture, config.moe)
    expert_groups = expert_groups_of(config.moe, group, device)
    module = _generating(given)
    if policy.kind != "decoder" or not module.can_generate():
        raise UnsupportedModelError("architectures", f"{type(module).__name__} is no causal language model")
    if config.set_empty_params:
        return Injection(given.module.to("meta").eval(), lambda: None)
    options = QuantOptions(config)
    plan = options.plan(policy, architecture, parameter_names(given.module))
    options.check_used()
    checkpoint = given.checkpoint(config)
    policy = _layout(policy, architecture, checkpoint)
    shard = _shard(config, group)
    weights = load_weights(
        architecture,
        checkpoint,
        dtype=dtype,
        device=device,
        quantization=plan,
        policy=policy,
        shard=shard,
        expert_shard=expert_groups and expert_groups.shard,
    )
    weights.probe()
    world = group or (expert_groups and expert_groups.world)
    if config.save_mp_checkpoint_path:
        quantized = quantized_of(policy, architecture, checkpoint.names(), plan)
        save(checkpoint, given.fields, config, dtype, quantized, world)
    limits = Limits(config.max_out_tokens, config.min_out_tokens)
    injected = CausalLM(
        module,
        architecture,
        weights,
        limits,
        device=device,
        enable_cuda_graph=config.enable_cuda_graph,
        group=group,
        shard=shard,
        expert_groups=expert_groups,
    )
    for one in (expert_groups.ep, expert_groups.mp) if expert_groups else ():
        if one is not None:
            same_random_state(one)
    return Injection(injected.module, injected.close, injected, injected.engine.observe_layers)


def _shard(config: InferenceConfig, group: Group | None) -> Shard | None:
    return None if group is None else Shard(group.rank, group.size, config.tensor_parallel.tp_grain_size)


def _generating(given: Given) -> Any:
    """The model, or one with its config and the interface of transformers' own, if it is a plain nn.Module."""
    if hasattr(given.module, "can_generate"):
        return given.module
    from shared.engine.hugging_face import UnlistedCausalLM

    return UnlistedCausalLM.of(given.fields)


def _layout(policy: Policy, architecture: Architecture, checkpoint: Checkpoint) -> Policy:
    """Whose names the checkpoint has: the family's own, Megatron-LM's for GPT-2, or DeepSpeed's for its layers."""
    present = checkpoint.names()
    if policy is POLICIES["gpt2"] and is_megatron(present):
        return MEGATRON_GPT2
    if is_injected(present):
        if architecture.gated or architecture.norm_order != "pre":
            raise UnsupportedCheckpointError(
                f"{policy.family}: layers as DeepSpeed's kernels save them are read of families with a plain MLP and a "
                "norm before each sub-layer; give the model's own checkpoint"
            )
        return as_injected(policy)
    return policy


def _as_it_is(model: nn.Module | str | Path, config: InferenceConfig, device: str, group: Group | None) -> Injection:
    dtype, quantizes = compute_dtype(config, device), not QuantOptions(config).is_plain
    if isinstance(config.injection_policy, Policy):
        raise ValueError("injection_policy: a Policy is for fused layers; set kernel_inject, or leave it out")
    if isinstance(model, str | Path):
        given = _loaded_folder(Path(model), config, dtype, without_weights=quantizes)
    else:
        given = given_module(model, config)
    if isinstance(config.injection_policy, dict):
        _check_suffixes(given.module, config.injection_policy)
    module = given.module
    if config.set_empty_params:
        return Injection(module.to("meta").eval(), lambda: None)
    if quantizes:
        if group is not None:
            raise ValueError(
                f"tensor_parallel.tp_size: {group.size}, and a quantized model is split by fused layers alone; set "
                "kernel_inject, or leave it out"
            )
        module = quantized_model(given, config, dtype, device)
        return Injection(module, lambda: None, wants_graph=config.enable_cuda_graph)
    family = POLICIES.get(str(given.fields.get("model_type")))
    ignored = family.ignored if family else ()
    split = None
    if group is not None:
        suffixes = config.injection_policy if isinstance(config.injection_policy, dict) else None
        split = Split(group, given.fields, config.tensor_parallel.tp_grain_size, suffixes)
    if given.is_meta:
        module = _in_memory(given, config, dtype, ignored, split)
    elif config.checkpoint is not None:
        load_into(module, given.checkpoint(config), ignored)
    module.eval().to(dtype)
    if config.save_mp_checkpoint_path:
        whole = given.checkpoint(config) if given.is_meta else Given(module, given.fields).checkpoint(InferenceConfig())
        save(whole, given.fields, config, dtype, group=group)
    if split is not None and not given.is_meta:
        split.of(module, device, dtype)
    return Injection(module.to(device), lambda: None, wants_graph=config.enable_cuda_graph)


def _loaded_folder(folder: Path, config: InferenceConfig, dtype: torch.dtype, *, without_weights: bool) -> Given:
    """As transformers loads it; on the meta device where a checkpoint has the weights, or if they are asked for so."""
    from shared.engine.hugging_face import is_listed, model_from_folder

    written = _config_json(folder)
    if not is_listed(written):
        raise UnsupportedModelError(
            "model_type", f"transformers has no class for {written.get('model_type')!r}; give the model itself"
        )
    if config.checkpoint is not None or config.set_empty_params or without_weights:
        return _given_folder(folder, config)
    allow_pickle = config.checkpoint_config.allow_pickle
    find_weights(folder, allow_pickle=allow_pickle)
    module = model_from_folder(folder, dtype, config.config or {}, allow_pickle=allow_pickle)
    return Given(module, written, folder)


def _in_memory(
    given: Given, config: InferenceConfig, dtype: torch.dtype, ignored: Iterable[str], split: Split | None
) -> nn.Module:
    """A model that is on the meta device, with its parameters read from the checkpoint, or this rank's part of them."""
    from shared.engine.hugging_face import PreTrainedModel, without_weights

    if config.checkpoint is None:
        raise ValueError("checkpoint: the model's weights are on the meta device; say where they are")
    if not isinstance(given.module, PreTrainedModel):
        raise ValueError(
            f"model: {type(given.module).__name__} is on the meta device, and how it is made anew is not known; give "
            "it in memory, or set kernel_inject"
        )
    checkpoint = given.checkpoint(config)
    if split is not None:
        return split.of_checkpoint(given.module, checkpoint, dtype, ignored)
    module = without_weights(given.module)
    load_into(module, checkpoint, ignored)
    return module


def _check_suffixes(model: nn.Module, policy: dict[type[nn.Module], tuple[str, ...]]) -> None:
    for kind, suffixes in policy.items():
        names = [name for module in model.modules() if isinstance(module, kind) for name, _ in module.named_modules()]
        for suffix in suffixes:
            if not any(name.endswith(suffix) for name in names):
                raise ValueError(f"Injection policy layer'{suffix}' not valid.")


def _encoder_folder(folder: Path) -> nn.Module:
    from shared.engine.hugging_face import encoder_from_folder

    return encoder_from_folder(folder)


def _encoders(given: Given, config: InferenceConfig, device: str, group: Group | None) -> Injection:
    checkpoint = given.checkpoint(config) if config.checkpoint else None
    shard, dtype, options = _shard(config, group), compute_dtype(config, device), QuantOptions(config)
    injected = EncoderModel(given.module, checkpoint, dtype, options, device, group, shard)
    return Injection(injected.module, injected.close, wants_graph=config.enable_cuda_graph)
