"""What `deepspeed.init_inference` gives: a model with fused layers behind its own interface.

    engine = init_inference(model, kernel_inject=True, dtype="bf16", max_out_tokens=2048)
    engine(input_ids, attention_mask=mask).logits
    engine.generate(input_ids, max_new_tokens=64)

Without kernel_inject the model computes as it did, in the dtype asked for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.config import InferenceConfig
from shared.engine.inject import Injection, inject
from shared.engine.model_profile import ModelProfile
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
        self.config = config
        self._injection: Injection | None = inject(model, config)
        self.module = self._injection.module
        self._profile: ModelProfile | None = None
        self._graph = ModuleGraph(self.module) if self._injection.wants_graph else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own interface and output type."""
        call = self._graph or self.module
        if self._profile is None:
            return call(*args, **kwargs)
        with self._profile.forward():
            return call(*args, **kwargs)
