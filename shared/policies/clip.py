"""CLIP's two towers (arXiv:2103.00020): of texts, each token seeing those before it, and of images, cut into patches.

Each may be a model of its own or one half of a `clip` checkpoint, whose config.json has one of theirs for each half.
"""

from collections.abc import Mapping

from shared.models.architecture import Patches
from shared.policies.fields import Fields, UnsupportedModelError
from shared.policies.gpt2 import GPT_RECORD
from shared.policies.names import Names, affine, rows, shaped
from shared.policies.policy import Policy

_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "intermediate_size": 2048, "num_hidden_layers": 12}
_OF_BOTH = (r".*position_ids", r"logit_scale", r"(text|visual)_projection\..*")


def _layers(tower: str) -> Names:
    layer = tower + ".encoder.layers.{layer}."
    parts = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    return {
        "qkv.weight": rows(*(f"{part}.weight" for part in parts)),
        "qkv.bias": rows(*(f"{part}.bias" for part in parts)),
        **affine("output", layer + "self_attn.out_proj"),
        **affine("attention_norm", layer + "layer_norm1"),
        **affine("up", layer + "mlp.fc1"),
        **affine("down", layer + "mlp.fc2"),
        **affine("mlp_norm", layer + "layer_norm2"),
    }


def _rest_of_text(fields: Fields) -> Mapping[str, object]:
    return {"num_positions": fields.integer("max_position_embeddings")}


def _rest_of_vision(fields: Fields) -> Mapping[str, object]:
    patches = Patches(fields.integer("image_size"), fields.integer("patch_size"), fields.integer("num_channels"))
    if not 0 < patches.size <= patches.image_size:
        raise UnsupportedModelError("patch_size", f"{patches.size} does not fit an image of {patches.image_size}")
    tokens = patches.count + 1
    return {"patches": patches, "num_positions": tokens, "max_context": tokens}


CLIP_TEXT = Policy(
    family="clip_text_model",
    kind="encoder",
    base="text_model",
    ignored=(*_OF_BOTH, r"vision_model\..*"),
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        **_DEFAULTS,
        "vocab_size": 49408,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    },
    record={**GPT_RECORD, "lm_head": False},
    rest=_rest_of_text,
    rotary=None,
    names={
        "embedding": rows("text_model.embeddings.token_embedding.weight"),
        "positions": rows("text_model.embeddings.position_embedding.weight"),
        **affine("final_norm", "text_model.final_layer_norm"),
        **_layers("text_model"),
    },
)

CLIP_VISION = Policy(
    family="clip_vision_model",
    kind="encoder",
    base="vision_model",
    # the norm of the class token alone is what the model's own code does with the hidden states
    ignored=(*_OF_BOTH, r"text_model\..*", r"(vision_model\.)?post_layernorm\..*", r"classifier\..*"),
    fields={"rms_norm_eps": "layer_norm_eps"},
    defaults={
        **_DEFAULTS,
        "intermediate_size": 3072,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "vocab_size": 1,
        "max_position_embeddings": 0,
    },
    record={**GPT_RECORD, "lm_head": False, "causal": False, "final_norm": False, "embedding_norm": True},
    rest=_rest_of_vision,
    rotary=None,
    names={
        "embedding": shaped("vision_model.embeddings.class_embedding"),
        "positions": rows("vision_model.embeddings.position_embedding.weight"),
        "patches.weight": shaped("vision_model.embeddings.patch_embedding.weight"),
        **affine("embedding_norm", "vision_model.pre_layrnorm"),
        **_layers("vision_model"),
    },
)
