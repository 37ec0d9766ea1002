"""A Hugging Face model on the engine's fused layers: the same interface, profiled, beside the model as it was.

    .venv/bin/python examples/init_inference.py [MODEL] [--tokens 32] [--runs 3]

MODEL: a name that `./tandem model` knows, or a folder; by default the one that is served by default. Both compute in
bfloat16. A step of decoding is (the time of a generate with all the tokens - that of one token) / their difference:
the median of runs that take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.config import DEFAULT_MODEL
from shared.engine import init_inference
from shared.model_files import ModelFiles, ModelNotFoundError
from shared.model_store import ModelStore

PROMPT = "The three things to know about the city of Rome are"


def main() -> None:
    parser = argparse.ArgumentParser(description="a Hugging Face model, plain and injected")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=32, help="generated in each run")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    files = find(args.model)
    plain = load(files)
    engine = init_inference(copy.deepcopy(plain), kernel_inject=True, dtype="bf16", max_out_tokens=512)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.to(engine.device)
    plain.to(engine.device)

    def generate(model: Any, num_tokens: int) -> torch.Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )[0, prompt.shape[1] :]

    ours, theirs = generate(engine, args.tokens), generate(plain, args.tokens)
    print(f"{files.name}: {tokenizer.decode(ours)!r}")
    print(f"greedy tokens that agree: {agreeing(ours, theirs)} of {args.tokens}, up to the first that does not")

    steps: dict[str, list[float]] = {"plain": [], "injected": []}
    for _ in range(args.runs):
        for name, model in (("plain", plain), ("injected", engine)):
            one_s, all_s = timed(generate, model, 1), timed(generate, model, args.tokens)
            steps[name].append(max(all_s - one_s, 1e-9) / (args.tokens - 1) * 1000)
    plain_ms, ours_ms = (statistics.median(steps[name]) for name in ("plain", "injected"))
    print(
        f"a step of decoding: plain {plain_ms:.2f} ms, injected {ours_ms:.2f} ms, the median of {args.runs} runs each"
    )
    print(f"speed-up of decoding: {plain_ms / ours_ms:.2f} x")

    engine.profile_model_time()
    generate(engine, args.tokens)
    prompt_ms, *step_ms = engine.model_times()
    print(f"forwards: {prompt_ms:.2f} ms for the prompt's {prompt.shape[1]} tokens, then {median(step_ms)} ms a step")
    engine.profile_model_time(layers=True)
    generate(engine, 8)
    layers = engine.layer_times()
    print(f"layers: {median([ms for forward in layers[1:] for ms in forward])} ms each of {len(layers[0])}, op by op")
    engine.destroy()


def find(model: str) -> ModelFiles:
    """Fetches it if it is not here."""
    store = ModelStore()
    try:
        return store.resolve(model)
    except ModelNotFoundError:
        return store.pull(model)


def load(files: ModelFiles) -> Any:
    """As transformers reads it, in bfloat16."""
    path = files.weights.paths[0]
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16).eval()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder), dtype=torch.bfloat16)
    model.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"], False)
    model.tie_weights()
    return model.eval()


def timed(function: Any, *arguments: Any) -> float:
    """Seconds. The tokens are on the host when it returns."""
    begun_s = time.perf_counter()
    function(*arguments).tolist()
    return time.perf_counter() - begun_s


def agreeing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a == b).cumprod(0).sum())


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}"


if __name__ == "__main__":
    main()
