"""A diffusers pipeline whose UNet and VAE compute by the engine's layers, and whose models are graphs of their own.

    engine = init_inference(pipeline, kernel_inject=True, dtype="bf16", enable_cuda_graph=True)
    image = engine("a lighthouse", num_inference_steps=20).images[0]

The pipeline stays what it is, scheduler and safety checker too, and its models are changed where they are: what was
replaced is freed. Without kernel_inject they compute as they did.

Local graphs: a pipeline as a whole cannot be captured, as it decides on the host, so its models are, each by itself:
the UNet, the VAE's encoder and decoder, the text encoders. On a CPU there is nothing to capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shared.config import InferenceConfig
from shared.engine.image_bindings import Binding, bindings
from shared.engine.quant_options import QuantOptions
from shared.engine.quantized_modules import forms_of, linears_of
from shared.models.quantization import Scheme
from shared.module_graph import ModuleGraph

# what says how a model is loaded or made, or how many tokens it makes; a pipeline comes loaded, and makes images
_OF_OTHER_MODELS = (
    "checkpoint",
    "base_dir",
    "save_mp_checkpoint_path",
    "set_empty_params",
    "injection_policy",
    "config",
    "triangular_masking",
    "max_out_tokens",
    "min_out_tokens",
)


def is_pipeline(model: object) -> bool:
    """Without importing diffusers: who has a pipeline has done that."""
    return any(
        kind.__name__ == "DiffusionPipeline" and kind.__module__.startswith("diffusers.")
        for kind in type(model).__mro__
    )


class InjectedPipeline:
    """A pipeline in its new form: `pipeline` is the one that was given."""

    def __init__(self, pipeline: Any, config: InferenceConfig, *, device: str, dtype: torch.dtype) -> None:
        """Raises ValueError naming the option, or the layer, that makes it impossible, before anything is changed."""
        _refuse(config)
        injects = config.replace_with_kernel_inject
        options = QuantOptions(config)
        if not options.is_plain and not injects:
            raise ValueError("quant: of a pipeline the engine's linears are quantized; set kernel_inject, or leave out")
        scheme = options.layers or options.every
        device = "cpu" if config.keep_module_on_host else device
        self.pipeline = pipeline
        self.bindings: list[tuple[str, Binding, int]] = []  # (model, whose op, how many of its layers)
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        if injects:
            from shared.engine.diffusers_models import ModelMixin, check

            image_models = {name: part for name, part in models.items() if isinstance(part, ModelMixin)}
            for name, part in image_models.items():
                check(name, part)
                forms_of(part, dict.fromkeys(linears_of(part), scheme) if scheme else {})
        else:
            image_models = {}
        for part in models.values():
            # torch's own `to`: that of diffusers logs a warning whatever the model
            nn.Module.to(part.eval().requires_grad_(False), device, dtype)
        for name, part in image_models.items():
            self._inject(name, part, bindings(device, dtype, scheme and scheme.quantization), scheme)
        for name, part in models.items():
            if name not in image_models and name.startswith("text_encoder"):
                setattr(pipeline, name, _text_encoder(part))
        if config.enable_cuda_graph and device == "cuda":
            for part in models.values():
                capture(part)

    def close(self) -> None:
        """Lets go of the pipeline, whose models go on working."""
        self.pipeline = None

    def _inject(self, name: str, model: nn.Module, whose: dict[str, Binding], scheme: Scheme | None) -> None:
        from shared.engine.diffusers_models import Replacer

        used: list[Binding] = []
        Replacer(whose, scheme, used).replace(model)
        for part in _called(model):
            part.register_forward_pre_hook(_refuse_gradients, with_kwargs=True)
        self.bindings += [(name, binding, count) for binding, count in Counter(used).items()]


def capture(model: nn.Module) -> None:
    """Makes a graph of each of the modules that a pipeline calls of that model."""
    for part in _called(model):
        graph = ModuleGraph(_Forward(part.forward))
        # beside the class's own: the part keeps its attributes, its type and its parameters' names
        object.__setattr__(part, "forward", _on_device(part, graph))


class _Forward(nn.Module):
    """A module's forward by itself."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _on_device(module: nn.Module, graph: nn.Module) -> Callable[..., Any]:
    """Calls the graph with arguments on the module's device: a time step may be a number, or lie on the host."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        device = next(module.parameters()).device
        if isinstance(kwargs.get("timestep"), int | float):
            kwargs["timestep"] = torch.tensor(kwargs["timestep"])
        elif len(args) > 1 and isinstance(args[1], int | float):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        return graph(*args, **kwargs)

    return forward


def _called(model: nn.Module) -> list[nn.Module]:
    """What pipelines call: an autoencoder's two halves, other models as a whole."""
    halves = [getattr(model, name, None) for name in ("encoder", "decoder")]
    if hasattr(model, "decode") and all(isinstance(half, nn.Module) for half in halves):
        return [half for half in halves if half is not None]
    return [model]


def _text_encoder(model: nn.Module) -> nn.Module:
    """What takes a text encoder's place: itself."""
    return model


def _refuse(config: InferenceConfig) -> None:
    plain = InferenceConfig()
    for name in _OF_OTHER_MODELS:
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{name}: not taken for a pipeline, which comes loaded and makes images; leave it out")
    if config.quant.weight.post_init_quant or not config.quant.qkv.enabled:
        name = "qkv.enabled" if not config.quant.qkv.enabled else "weight.post_init_quant"
        raise ValueError(f"quant.{name}: not taken for a pipeline, whose linears are quantized alike; leave it out")


def _refuse_gradients(module: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))
    ):
        raise RuntimeError(f"{type(module).__name__}: injected layers give no gradients; call it under torch.no_grad")
