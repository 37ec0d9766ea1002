"""A diffusers pipeline on the engine's layers, beside itself as it was: the difference of the images, and the times.

    .venv/bin/python examples/diffusion.py
    .venv/bin/python examples/diffusion.py --dtype bf16 --channels 128

The weights are random and the pipeline is small, so that nothing is downloaded; a real one is injected by the same
line.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.engine import init_inference

PROMPT = "a lighthouse in a storm"
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares a pipeline with kernel injection with the plain one.")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels", type=int, default=32, help="of the first block, a multiple of 32")
    parser.add_argument("--size", type=int, default=64, help="of the image, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    plain = init_inference(make_pipeline(options.channels), dtype=options.dtype)
    injected = init_inference(make_pipeline(options.channels), dtype=options.dtype, kernel_inject=True)

    times: dict[str, list[float]] = {"plain": [], "injected": []}
    images = {}
    for _ in range(1 + ROUNDS):  # by turns, as machines are not always equally fast
        for name, engine in (("plain", plain), ("injected", injected)):
            started = time.perf_counter()
            images[name] = draw(engine, options.size, options.steps)
            times[name].append(time.perf_counter() - started)
    difference = (images["plain"] - images["injected"]).abs()
    for model, op, implementation, count in injected.bindings():
        print(f"{model:5} {op:15} {implementation:6} {count} layers")
    best = {name: min(measured[1:]) for name, measured in times.items()}
    print(f"image difference: {difference.max():.2e} at most, {difference.mean():.2e} on average, of 1")
    print(
        f"plain {best['plain']:.3f} s, injected {best['injected']:.3f} s: {best['plain'] / best['injected']:.2f} times"
    )


def draw(engine: Any, size: int, steps: int) -> torch.Tensor:
    """float32 [1, 3, size, size], of 0 to 1."""
    engine.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wants = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "pt"}
    return engine(PROMPT, generator=generator, **wants).images.float().cpu()


def make_pipeline(channels: int) -> Any:
    """Stable Diffusion's parts, with two blocks each way and the same random weights at each call."""
    torch.manual_seed(0)
    widths: Any = (channels, 2 * channels)
    encoder_blocks: Any = ("DownEncoderBlock2D",) * 2
    decoder_blocks: Any = ("UpDecoderBlock2D",) * 2
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=widths, down_block_types=encoder_blocks, up_block_types=decoder_blocks, norm_num_groups=32
    )
    text = CLIPTextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=510,
        eos_token_id=511,
        pad_token_id=511,
    )
    letters = sorted(ByteLevel.alphabet())[:255]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    scheduler: Any = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    nothing: Any = None
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77),
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
