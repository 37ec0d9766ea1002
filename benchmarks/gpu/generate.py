"""The same model in transformers: `generate` with a static cache, whose decode steps it compiles and replays itself."""

from __future__ import annotations

from functools import partial

import torch
import transformers

from benchmarks.gpu import engine
from benchmarks.gpu.results import Figure, Results
from benchmarks.gpu.shapes import Sizes, device
from benchmarks.gpu.timing import host_s

PART = "transformers"
_BARS = (1.0, 1.5)  # of the two batches


def run(results: Results, sizes: Sizes) -> None:
    """Adds every figure. The first call compiles, the second is timed."""
    batches, prompt_tokens, new_tokens = sizes.generate
    model = _make_model(sizes)
    for batch, bar in zip(batches, _BARS, strict=True):
        name = f"against transformers, batch {batch}"
        with results.attempt(PART, name, "x", bar):
            torch.compiler.reset()  # or it would compile the next batch for any size
            prompts = torch.randint(sizes.model["vocab_size"], (batch, prompt_tokens), device=device())
            first_s, seconds = (host_s(partial(_generate, model, prompts, new_tokens)) for _ in range(2))
            theirs = batch * new_tokens / seconds
            ours = results.find(engine.PART, engine.generate_name(batch))
            if ours is None or ours.value is None:
                raise RuntimeError(
                    f"it makes {theirs:,.0f} tokens/s, and no {engine.generate_name(batch)} was measured"
                )
            note = f"{ours.value:,.0f} against {theirs:,.0f} tokens/s; its first call took {first_s:.0f} s"
            results.add(PART, Figure(name, ours.value / theirs, "x", bar, note, seconds))


def _make_model(sizes: Sizes) -> transformers.PreTrainedModel:
    fields = dict(sizes.model)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # no random token ends a sequence
    return model


def _generate(model: transformers.PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> None:
    out = model.generate(  # pyright: ignore[reportCallIssue]
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    if out.shape[1] != prompts.shape[1] + new_tokens:
        raise RuntimeError(f"{out.shape[1]} tokens instead of {prompts.shape[1] + new_tokens}")
