"""What `deepspeed.init_inference` gives: a model with fused layers behind its own interface.

    engine = init_inference(model, kernel_inject=True, dtype="bf16", max_out_tokens=2048)
    engine(input_ids, attention_mask=mask).logits
    engine.generate(input_ids, max_new_tokens=64)

Without kernel_inject the model computes as it did, in the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shared.config import InferenceConfig
from shared.engine.causal_lm import by_name, prompt_of
from shared.engine.inject import Injection, inject
from shared.engine.model_profile import ModelProfile
from shared.engine.session import too_long
from shared.module_graph import ModuleGraph


def init_inference(model: Any, config: Any = None, **kwargs: Any) -> InferenceEngine:
    """model: a Hugging Face model (its weights may be on the meta device), a folder, or a diffusers pipeline.

    config: None, a dict, the path of a JSON file or an InferenceConfig; kwargs: its fields. A field in both has to have
    the same value. Raises ValueError for a configuration that is not one, before the model is looked at; for a model
    that cannot be injected UnsupportedModelError, which names the field of its config.
    """
    return InferenceEngine(model, InferenceConfig.of(config, **kwargs))


class InferenceEngine(nn.Module):
    """A model that computes through the engine. Any number of them live in one process; `destroy` frees one.

    What it does not have itself it has from its module: config, device, generation_config, can_generate.
    """

    def __init__(self, model: Any, config: InferenceConfig) -> None:
        super().__init__()
        config.check_supported()
        self._config = config
        self._injection: Injection | None = None
        self._profile: ModelProfile | None = None
        self._take_over(inject(model, config))

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own interface and output type."""
        self._check_alive()
        # layers are seen in the module itself, not in a graph of it
        by_graph = self._graph is not None and not (self._profile is not None and self._profile.layers)
        called: Callable[..., Any] = self._graph if self._graph is not None and by_graph else self.module
        if self._profile is None or (isinstance(self.module, nn.Module) and not by_graph):
            return called(*args, **kwargs)
        with self._profile.whole():
            return called(*args, **kwargs)

    @torch.inference_mode()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, over a cache that this call begins with and ends with.

        Raises NotImplementedError for beams, RuntimeError for a prompt, or a prompt with the new tokens, that exceeds
        max_out_tokens, and AttributeError for a model that does not generate.
        """
        from shared.engine.hugging_face import Asked

        self._check_alive()
        generate = getattr(self.module, "generate", None)
        if generate is None:
            raise AttributeError(f"{type(self.module).__name__} does not generate")
        arguments = by_name(args, kwargs)
        asked = Asked.of(self.module, arguments)
        if (asked.config.num_beams or 1) > 1:
            raise NotImplementedError(
                "DeepSpeed does not support `num_beams` > 1, and neither does this engine: its cache holds one "
                "continuation of a prompt. Leave num_beams out, or ask for num_return_sequences with do_sample"
            )
        prompt = prompt_of(arguments)
        self._check_length(1 if prompt is None else prompt.shape[-1], asked)
        reset_cache: Callable[[], None] | None = getattr(self.module, "reset_cache", None)
        if reset_cache is not None:
            reset_cache()
        return generate(*args, **kwargs)

    def profile_model_time(self, use_cuda_events: bool = True, *, layers: bool = False) -> None:
        """Times every forward from here on, those of `generate` too; called again, it changes how.

        use_cuda_events: on a CUDA device, by the device's own clock; otherwise by the wall clock. layers: their times,
        too, for which forwards run op by op, without graphs and replays.
        """
        self._check_alive()
        if self._profile is None:
            observe = self._injection.observe_layers if self._injection else None
            watches = self._graph is None and isinstance(self.module, nn.Module)
            self._profile = ModelProfile(self.module, observe, watches_calls=watches)
        self._profile.set(use_cuda_events=use_cuda_events, layers=layers)

    def model_times(self) -> list[float]:
        """ms of each forward since the last call of this. Raises AssertionError unless profiling is on."""
        assert self._profile is not None, "model profiling is not enabled"
        times = self._profile.model_times()
        if not times and self._config.enable_cuda_graph:
            raise ValueError(
                "Model times are empty and cuda graph is enabled: nothing went through the graph since profiling "
                "began; call the engine"
            )
        return times

    def layer_times(self) -> list[list[float]]:
        """ms of each layer, by forwards since the last call of this. Raises AssertionError unless it was asked for."""
        assert self._profile is not None, "model profiling is not enabled"
        assert self._profile.layers, "layer profiling is not enabled: profile_model_time(layers=True)"
        return self._profile.layer_times()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The weights of a model that set_empty_params left without, by the model's own names; else as any module."""
        if self._injection is None or not self._config.set_empty_params:
            if self._injection is not None and self._injection.causal_lm is not None:
                return self.module.load_state_dict(state_dict)  # which says why it cannot
            return super().load_state_dict(state_dict, strict, assign)
        from shared.engine.hugging_face import PreTrainedModel, without_weights

        if not isinstance(self.module, PreTrainedModel):
            raise ValueError(
                f"set_empty_params: how {type(self.module).__name__} is made anew is not known; load its weights "
                "first, and leave it out"
            )
        module = without_weights(self.module)
        loaded = module.load_state_dict(state_dict, strict)
        self._config = self._config.model_copy(update={"set_empty_params": False})
        self._take_over(inject(module, self._config))
        return loaded

    def bindings(self) -> list[tuple[str, str, str, int]]:
        """What a pipeline's replaced layers compute with: (model, op, "engine" or "torch", number of layers).

        Other models compute with the engine's ops alone, and list none.
        """
        pipeline = self._injection.pipeline if self._injection else None
        table = pipeline.bindings if pipeline else []
        return [(model, binding.op, binding.implementation, count) for model, binding, count in table]

    def destroy(self) -> None:
        """Frees weights, caches and graphs; no call can follow. Once is enough, twice is no harm."""
        if self._profile is not None:
            self._profile.close()
        if self._injection is not None:
            self._injection.close()
        self._injection = self._graph = self._profile = None
        self.module = nn.Module()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("__"):
                raise
            # a pipeline is no nn.Module, and stands among the plain attributes
            module = self.__dict__.get("module") or self._modules["module"]
            return getattr(module, name)

    def _take_over(self, injection: Injection) -> None:
        if injection.wants_graph and not torch.cuda.is_available():
            raise ValueError(
                "enable_cuda_graph: there is no CUDA device, and a model without kernel injection is replayed by "
                "nothing else; leave it out"
            )
        self._injection, self.module = injection, injection.module
        self._graph = ModuleGraph(self.module) if injection.wants_graph else None

    def _check_alive(self) -> None:
        if self._injection is None:
            raise RuntimeError("this engine was destroyed; make another one by init_inference")
        if self._config.set_empty_params:
            raise RuntimeError("set_empty_params: the model has no weights yet; load_state_dict brings them")

    def _check_length(self, length: int, asked: Any) -> None:
        most = max_context = self._config.max_out_tokens
        causal_lm = self._injection.causal_lm if self._injection else None
        if causal_lm is not None:
            most, max_context = causal_lm.max_tokens, causal_lm.max_context
        else:
            max_context += 1  # a limit of the model itself is its own to tell
        if length > most:
            raise RuntimeError(too_long(length, most, max_context))
        # an encoder-decoder's output has a length of its own
        before = 0 if getattr(getattr(self.module, "config", None), "is_encoder_decoder", False) else length
        total = asked.max_total_tokens
        if asked.max_new_tokens is not None:
            total = before + asked.max_new_tokens
        if total is not None and total > most:
            raise RuntimeError(
                f"{too_long(total, most, max_context)} {length} of them are the prompt's, and {total - before} are to "
                "be generated."
            )
