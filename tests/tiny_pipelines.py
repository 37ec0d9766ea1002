"""Diffusion pipelines with random weights, made from configs: a hundred thousand parameters, images of 32 x 32."""

from __future__ import annotations

from typing import Any

import torch


def stable_diffusion(seed: int = 0, **unet: Any) -> Any:
    """A StableDiffusionPipeline; `unet` are fields of its UNet's config."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **_parts(seed, {"cross_attention_dim": 32, **unet}),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def stable_diffusion_xl(seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline: two text encoders, linear projections, more blocks at a place."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    parts = _parts(
        seed,
        {
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
    )
    second = CLIPTextModelWithProjection(parts["text_encoder"].config)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=parts["tokenizer"])


def _parts(seed: int, unet: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=510,
        eos_token_id=511,
        pad_token_id=511,
    )
    return {
        "unet": UNet2DConditionModel(
            **{
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "sample_size": 16,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": (2, 4),
                "norm_num_groups": 8,
                **unet,
            }
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=8,
            sample_size=32,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": _tokenizer(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    }


def _tokenizer() -> Any:
    """CLIP's without merges: a token for each byte, and for each byte that ends a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())[:255]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
