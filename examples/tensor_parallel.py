"""One model on several ranks: each reads its part of the weights, and all give the tokens of one process.

    .venv/bin/python examples/tensor_parallel.py [MODEL] [--ranks 2] [--tokens 32]
    .venv/bin/torchrun --nproc-per-node 2 examples/tensor_parallel.py

MODEL: a name that `./tandem model` knows, or a folder; by default the one that is served by default. By itself the
program starts the ranks as processes of this host, which exchange over gloo; torchrun may start them instead.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.config import DEFAULT_MODEL
from shared.engine import init_inference
from shared.model_files import ModelFiles, ModelNotFoundError
from shared.model_store import ModelStore
from shared.parallel.sharding import head_shares

PROMPT = "The three things to know about the city of Rome are"


def main() -> int:
    parser = argparse.ArgumentParser(description="a model on several ranks")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    files = find(args.model)
    if "RANK" in os.environ:
        return compute(files, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.tokens)
    return start(args.ranks)


def start(num_ranks: int) -> int:
    """This program once for each rank, as torchrun would start it -> 0 if all ended well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:]],
            env={**os.environ, **{name: str(value) for name, value in shared.items()}, "RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def compute(files: ModelFiles, rank: int, num_ranks: int, num_tokens: int) -> int:
    """What one rank does: the same as every other. Rank 0 then computes alone, too, and compares."""
    torch.set_num_threads(max(len(os.sched_getaffinity(0)) // num_ranks, 1))
    torch.manual_seed(rank)  # each would draw others, but for rank 0's random state, which all get
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    greedy, drawn = generate(files, prompt, num_tokens, num_ranks)

    config = AutoConfig.from_pretrained(files.folder)
    share = head_shares(config.num_attention_heads, config.num_key_value_heads, num_ranks)[rank]
    # in one piece: the ranks write to the same place
    sys.stdout.write(
        f"rank {rank}: {len(share.queries)} of {config.num_attention_heads} heads; drew {drawn.tolist()}\n"
    )
    sys.stdout.flush()
    if rank:
        return 0
    alone, _ = generate(files, prompt, num_tokens, 1)
    print(f"{files.name}: {tokenizer.decode(greedy)!r}")
    are_equal = torch.equal(greedy, alone)
    print(f"{len(greedy)} greedy tokens of {num_ranks} ranks: {'those' if are_equal else 'NOT those'} of one process")
    return 0 if are_equal else 1


def generate(files: ModelFiles, prompt: torch.Tensor, num_tokens: int, num_ranks: int) -> tuple[Any, Any]:
    """Greedy tokens, and eight that are drawn: of ranks, from the random state of rank 0."""
    weights = files.weights.paths[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder))
    engine = init_inference(
        model,
        kernel_inject=True,
        dtype="bf16",
        max_out_tokens=512,
        checkpoint=str(weights if files.weights.kind == "gguf" else weights.parent),
        tensor_parallel={"tp_size": num_ranks},
    )
    prompt = prompt.to(engine.device)

    def new_tokens(count: int, do_sample: bool) -> torch.Tensor:
        found = engine.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=do_sample,
        )
        return found[0, prompt.shape[1] :].cpu()

    found = new_tokens(num_tokens, False), new_tokens(8, True)
    engine.destroy()
    return found


def find(model: str) -> ModelFiles:
    """Fetches it if it is not here."""
    store = ModelStore()
    try:
        return store.resolve(model)
    except ModelNotFoundError:
        return store.pull(model)


if __name__ == "__main__":
    sys.exit(main())
