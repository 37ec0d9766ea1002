"""Tiny random encoders, made on the fly, once per test process.

path = tiny_encoder("bert")      # a Hugging Face folder: config, safetensors, tokenizer
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from shared.model_files import ModelError, ModelFiles
from shared.model_store import ModelStore
from tests.tiny_models import models_root, tiny_tokenizer

_TEXT: dict[str, object] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.3,
}
_CLIP_TEXT = {**_TEXT, "projection_dim": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_CLIP_VISION = {
    **{name: value for name, value in _TEXT.items() if name not in ("vocab_size", "max_position_embeddings")},
    "projection_dim": 40,
    "image_size": 30,
    "patch_size": 6,
}
ENCODERS: dict[str, dict[str, object]] = {
    "bert": {"model_type": "bert", **_TEXT},
    "roberta": {"model_type": "roberta", **_TEXT, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 384,
        "dim": 64,
        "hidden_dim": 96,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 80,
        "initializer_range": 0.3,
    },
    "clip_text": {"model_type": "clip_text_model", **_CLIP_TEXT},
    "clip_vision": {"model_type": "clip_vision_model", **_CLIP_VISION},
    "clip": {"model_type": "clip", "text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 40},
}


def random_encoder(kind: str, architecture: str | None = None) -> PreTrainedModel:
    """A random model of ENCODERS, float32, of a class of transformers or of the one without a head."""
    fields = dict(ENCODERS[kind])
    config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config) if architecture else AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            # Fresh norms are 1 and fresh biases 0, and CLIP's first weights are tiny: nothing would show.
            if parameter.ndim == 1:
                low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
                torch.nn.init.uniform_(parameter, low, high)
            elif parameter.ndim > 1 and kind.startswith("clip"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@functools.cache
def tiny_encoder(kind: str = "bert") -> Path:
    """A folder with the random model of ENCODERS and a tokenizer."""
    folder = models_root() / f"tiny-encoder-{kind}"
    random_encoder(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder, save_jinja_files=False)
    return folder


@functools.cache
def minilm() -> ModelFiles:
    """The real embedding model. A test that needs it is skipped where it is neither cached nor can be fetched."""
    try:
        return ModelStore().pull("all-minilm-l6-v2")
    except ModelError as error:
        pytest.skip(f"all-minilm-l6-v2 is not here and cannot be fetched: {error}")
