"""The model that a gateway serves, as far as text and defaults go: its weights are the workers' affair."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shared.chat_template import ChatTemplate
from shared.model_files import ModelFiles
from shared.policies.table import embeds
from shared.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingDefaults:
    """What the model's generation_config.json says of parameters that a request leaves unset.

    A value that stands there counts whether or not `do_sample` stands beside it: greedy is asked for by temperature 0
    and by nothing else.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, folder: Path) -> SamplingDefaults:
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        return cls(**known)


@dataclass(frozen=True)
class ServedModel:
    """name: the one that clients use. digest: hex sha256 over configuration and weights, as they are quantized; workers
    must have the same.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults
    embeds: bool = False  # it answers vectors, and has no decode workers

    @classmethod
    def load(cls, name: str, files: ModelFiles, form: str) -> ServedModel:
        """Reads the small files of a model's folder. form: of its weights, as TandemConfig.weights_form says it."""
        tokenizer = Tokenizer.load(files.folder)
        return cls(
            name=name,
            digest=files.digest_as(form),
            tokenizer=tokenizer,
            chat_template=ChatTemplate.load(files.folder, tokenizer.special_tokens),
            defaults=SamplingDefaults.load(files.folder),
            embeds=embeds(files.config),
        )
