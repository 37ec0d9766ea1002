"""What `deepspeed.init_inference` gives: a model with fused layers behind its own interface.

    engine = init_inference(model, kernel_inject=True, dtype="bf16", max_out_tokens=2048)
    engine(input_ids, attention_mask=mask).logits
    engine.generate(input_ids, max_new_tokens=64)

Without kernel_inject the model computes as it did, in the dtype asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.config import InferenceConfig
from shared.engine.inject import Injection, inject
from shared.module_graph import ModuleGraph


def init_inference(model: Any, config: Any = None, **kwargs: Any) -> InferenceEngine:
    """model: a Hugging Face model (its weights may be on the meta device), a folder, or a diffusers pipeline.

    config: None, a dict, the path of a JSON file or an InferenceConfig; kwargs: its fields. A field in both has to have
    the same value. Raises ValueError for a configuration that is not one, before the model is looked at; for a model
    that cannot be injected UnsupportedModelError, which names the field of its config.
    """
    return InferenceEngine(model, InferenceConfig.of(config, **kwargs))


class InferenceEngine(nn.Module):
    """A model that computes through the engine. Any number of them live in one process; `destroy` frees one."""

    def __init__(self, model: Any, config: InferenceConfig) -> None:
        super().__init__()
        config.check_supported()
        self._config = config
        self._injection: Injection | None = inject(model, config)
        self.module = self._injection.module
        self._graph = ModuleGraph(self.module) if self._injection.wants_graph else None

    def __getattr__(self, name: str) -> Any:
        """A pipeline's own attributes are the engine's: `engine.unet`."""
        injection = self.__dict__.get("_injection")
        if injection is not None and injection.pipeline is not None and hasattr(injection.module, name):
            return getattr(injection.module, name)
        return super().__getattr__(name)

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own interface and output type."""
        return (self._graph or self.module)(*args, **kwargs)

    @torch.inference_mode()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, over a cache that this call begins with and ends with.

        Raises NotImplementedError for beams, RuntimeError for a prompt, or a prompt with the new tokens, that exceeds
        max_out_tokens, and AttributeError for a model that does not generate.
        """
        from shared.engine.hugging_face import KvSessionCache, asked_of_generation

        generate = getattr(self.module, "generate", None)
        if generate is None:
            raise AttributeError(f"{type(self.module).__name__} does not generate")
        names = ("inputs", "generation_config")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        asked = asked_of_generation(self.module, arguments)
        if (asked.num_beams or 1) > 1:
            raise NotImplementedError(
                "num_beams: DeepSpeed does not support `num_beams` > 1, and neither do the engine's caches"
            )
        prompt = arguments.get("input_ids", arguments.get("inputs"))
        causal_lm = self._injection.causal_lm if self._injection else None
        if prompt is not None:
            self._check_length(prompt.shape[-1], asked)
        if causal_lm is None or asked.use_cache is False or kwargs.get("past_key_values") is not None:
            return generate(*args, **kwargs)
        if prompt is None:
            raise ValueError("input_ids: wants the prompts' token ids [rows, columns]")
        session = causal_lm.session(prompt.shape[0] * (asked.num_return_sequences or 1))
        try:
            return generate(*args, **{**kwargs, "past_key_values": KvSessionCache(session)})
        finally:
            session.close()

    def _check_length(self, length: int, asked: Any) -> None:
        most = self._config.max_out_tokens
        if length > most:
            raise RuntimeError(
                f"Input with size {length} exceeds maximum length of {most}. Please increase max_tokens in the "
                "inference config."
            )
        new = asked.max_new_tokens
        if new is not None and length + new > most:
            raise RuntimeError(
                f"Input with size {length} and {new} new tokens exceeds maximum length of {most}. Please increase "
                "max_tokens in the inference config, or ask for fewer tokens."
            )

    def destroy(self) -> None:
        """Frees weights, caches and graphs; no call can follow."""
        if self._injection is not None:
            self._injection.close()
        self._injection = self._graph = None
        self.module = nn.Module()
