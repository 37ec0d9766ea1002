"""`make bench-quality`: what quantization costs the default model, on the text of benchmarks/quality.txt.

    python -m benchmarks.quality [--model NAME]

Perplexity is e^(mean of -log p) over the text's tokens after the first. Agreement is the share of positions at which
the most probable token is bfloat16's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table, box
from torch import Tensor

from kernels.kv_format import GREATEST
from shared.batch import BatchEntry
from shared.config import DEFAULT_MODEL, QuantizationMode, load_config
from shared.engine import Engine, EnginePlan
from shared.model_store import ModelStore
from shared.tokenizer import Tokenizer

TEXT = Path(__file__).with_suffix(".txt")
CHUNK = 256


def logits_of(engine: Engine, token_ids: Sequence[int]) -> Tensor:
    """float32 [tokens, vocab]."""
    block_tokens = engine.plan.layout.block_tokens
    table = list(range(1, 2 + len(token_ids) // block_tokens))
    parts = [
        engine.forward([BatchEntry(token_ids[start : start + CHUNK], start, table, "all")]).clone()
        for start in range(0, len(token_ids), CHUNK)
    ]
    return torch.cat(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    model = parser.parse_args(argv).model
    table = Table(box=box.MARKDOWN)
    for column in ("weights", "keys and values", "perplexity", "agreement with bfloat16"):
        table.add_column(column, justify="left" if column in ("weights", "keys and values") else "right")
    files = ModelStore().resolve(model)
    token_ids = Tokenizer.load(files.folder).encode(TEXT.read_text())
    expected: Tensor | None = None
    kinds = [(mode, "bfloat16") for mode in get_args(QuantizationMode)] + [("none", kv_dtype) for kv_dtype in GREATEST]
    for mode, kv_dtype in kinds:
        config = load_config(None, {"model": model, "quantization": mode, "kv_dtype": kv_dtype})
        engine = Engine(EnginePlan.of(config, config.prefill, files))
        logits = logits_of(engine, token_ids)
        engine.close()
        best = logits[:-1].argmax(-1)
        expected = best if expected is None else expected
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(token_ids[1:]))
        name = "bfloat16" if mode == "none" else mode
        table.add_row(name, kv_dtype, f"{math.exp(loss):.2f}", f"{(best == expected).double().mean():.3f}")
    Console(width=100).print(f"{len(token_ids)} tokens", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
