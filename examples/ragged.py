"""Prompts through the ragged engine: in steps of so many tokens, swapped out, and from one engine to another.

    .venv/bin/python examples/ragged.py [MODEL] [--tokens 24] [--step-tokens 48]

MODEL: a name that `./tandem model` knows, or a folder; by default the one that is served by default. While all
generate, the keys and values of one sequence go to host memory and come back, and those of another go on in a second
engine with blocks of another size. The tokens are compared with those of `generate`, which has each prompt alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.config import DEFAULT_MODEL
from shared.engine import RaggedEngine, SplitFuse, init_inference
from shared.model_files import ModelFiles, ModelNotFoundError
from shared.model_store import ModelStore
from shared.sampling_params import SamplingParams

PROMPTS = (
    "The capital of France is",
    "Three things to know about the city of Rome: it was not built in a day, all roads lead there, and",
    "Water boils at a lower temperature on a mountain, because",
    "A long list of numbers: " + ", ".join(str(number) for number in range(40)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="prompts of any length through the ragged engine")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=24, help="generated for each prompt")
    parser.add_argument("--step-tokens", type=int, default=48, help="of a step at most")
    args = parser.parse_args()

    files = find(args.model)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    limits = {
        "max_ragged_batch_size": args.step_tokens,
        "max_ragged_sequence_count": 8,
        "max_context": 512,
        "memory_config": {"mode": "allocate", "size": 96},
        "offload": True,
    }
    engine = RaggedEngine(args.model, state_manager=limits, dtype="bf16")
    second = RaggedEngine(args.model, state_manager=limits, dtype="bf16", block_tokens=32)
    here, there = SplitFuse(engine), SplitFuse(second)

    params = SamplingParams(max_tokens=args.tokens, seed=0, temperature=0)
    uids = [here.submit(prompt, params) for prompt in prompts]
    generated: dict[int, list[int]] = {}
    num_steps = 0
    while num_steps < 8:
        generated |= {request.uid: request.generated for request in here.step()}
        num_steps += 1
    print(f"{num_steps} steps of {args.step_tokens} tokens or fewer; {engine.free_blocks} blocks are free")

    engine.offload(uids[0])
    print(f"the first sequence is in host memory; {engine.free_blocks} blocks are free")
    request, state = here.hand_over(uids[1])
    assert state is not None
    moved = there.take_over(request, state)
    print(f"the second goes on elsewhere: {state.num_tokens} tokens in {state.num_bytes:,} bytes")

    # the first comes back by itself, as there is room for it
    generated |= {request.uid: request.generated for request in here.run()}
    generated[uids[1]] = next(request.generated for request in there.run() if request.uid == moved)

    folder = files.weights.paths[0].parent
    alone = init_inference(folder, kernel_inject=True, dtype="bf16", max_out_tokens=512)
    equal = 0
    for uid, prompt in zip(uids, prompts, strict=True):
        ids = torch.tensor([prompt], device=alone.device)
        expected = alone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        equal += generated[uid] == expected
        print(f"{len(prompt):4d} tokens … {tokenizer.decode(generated[uid])!r}")
    print(f"equal to generate's: {equal} of {len(prompts)}")
    for each in (engine, second, alone):
        each.destroy()
    sys.exit(equal < len(prompts))


def find(model: str) -> ModelFiles:
    """Fetches it if it is not here."""
    store = ModelStore()
    try:
        return store.resolve(model)
    except ModelNotFoundError:
        return store.pull(model)


if __name__ == "__main__":
    main()
