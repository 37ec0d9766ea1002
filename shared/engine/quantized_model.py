"""A model that computes by its own code, with quantized linears: without kernel injection.

A model in memory has its layers replaced one by one. One whose weights lie in files is made without them, and each
layer is quantized as its parameter is read: the floats are never all there.
"""

from __future__ import annotations

import torch
from torch import nn

from shared.config import InferenceConfig
from shared.engine.given import Given, load_into
from shared.engine.quant_options import QuantOptions
from shared.engine.quantized_modules import embeddings_of, forms_of, linears_of, quantize_modules
from shared.engine.saving import save
from shared.policies.table import POLICIES


def quantized_model(given: Given, config: InferenceConfig, dtype: torch.dtype, device: str) -> nn.Module:
    """Raises ValueError for what the options and the model make impossible, CheckpointError for its weights."""
    options, family = QuantOptions(config), POLICIES.get(str(given.fields.get("model_type")))
    module, ignored = given.module, family.ignored if family else ()
    in_files = given.is_meta or given.folder is not None
    if in_files:
        module = _unread(given, config, dtype)
    elif config.checkpoint is not None:
        load_into(module, given.checkpoint(config), ignored)
    schemes = options.schemes(linears_of(module), embeddings_of(module), family)
    options.check_used()
    if not schemes:
        raise ValueError(f"quant: {type(module).__name__} has no nn.Linear that it could quantize; leave it out")
    forms = forms_of(module, schemes)
    checkpoint = given.checkpoint(config) if in_files else None
    if config.save_mp_checkpoint_path:
        source = checkpoint or Given(module, given.fields).checkpoint(InferenceConfig())
        as_stored = [name for name in forms if type(module.get_submodule(name)) in _AS_STORED]
        save(source, given.fields, config, dtype, {f"{name}.weight": forms[name] for name in as_stored})
        del source  # which holds the floats
    read = quantize_modules(module, forms, dtype=dtype, device=device, checkpoint=checkpoint)
    if checkpoint is not None:
        _materialize(module)
        load_into(module, checkpoint, ignored, read=read)
    return module.eval().to(dtype).to(device)


_AS_STORED = (nn.Linear, nn.Embedding)  # [out, in]; GPT-2's are the other way round


def _unread(given: Given, config: InferenceConfig, dtype: torch.dtype) -> nn.Module:
    """The model without weights: its linears and embeddings have no memory at all."""
    from shared.engine.hugging_face import PreTrainedModel, without_weights

    if config.checkpoint is None and given.folder is None:
        raise ValueError("checkpoint: the model's weights are on the meta device; say where they are")
    if not isinstance(given.module, PreTrainedModel):
        raise ValueError(
            f"model: {type(given.module).__name__} is on the meta device, and how it is made anew is not known; give "
            "it in memory, or set kernel_inject"
        )
    return without_weights(given.module, dtype, on_meta=(nn.Linear, nn.Embedding))


def _materialize(module: nn.Module) -> None:
    """Memory for the parameters that are still on the meta device; one of two names stays one."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                fresh = made.setdefault(
                    id(parameter), nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                )
                setattr(part, name, fresh)
