"""Replayed steps against eager ones: the same bits, whatever was replayed before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.dtypes import DTYPES
from shared.batch import BatchEntry, build_batch
from shared.checkpoint import open_checkpoint
from shared.graphs import ReplayRunner
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights, read_json
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.policies.table import architecture_of

NUM_BLOCKS, BLOCK_TOKENS, MAX_SEQUENCES = 40, 16, 13

Run = Callable[[list[BatchEntry]], torch.Tensor]


@pytest.fixture(params=[("float32", "none"), ("bfloat16", "none"), ("float32", "int4"), ("bfloat16", "int8")])
def runs(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> tuple[Run, Run]:
    """Steps of one model run eagerly and replayed, over caches that hold the same."""
    folder = tiny_model("qwen3")
    files = ModelFiles("qwen3", folder, find_weights(folder), "")
    architecture = architecture_of(read_json(folder / "config.json"))
    dtype, quantization = request.param
    weights = load_weights(
        architecture,
        open_checkpoint(files),
        dtype=DTYPES[dtype],
        device="cpu",
        quantization=QuantizationPlan.of_mode(quantization),
    )
    decoder = Decoder(architecture, weights)
    layout = KvLayout.of(architecture, "", dtype, BLOCK_TOKENS)
    caches = KvCache(layout, NUM_BLOCKS), KvCache(layout, NUM_BLOCKS)
    torch.manual_seed(0)
    layout.format.elements(caches[0].pool).normal_()
    caches[1].pool.copy_(caches[0].pool)
    runner = ReplayRunner(
        lambda batch, workspace: decoder.forward(batch, caches[1], workspace),
        max_sequences=MAX_SEQUENCES,
        block_tokens=BLOCK_TOKENS,
        table_width=8,
    )
    return lambda entries: decoder.forward(build_batch(entries, BLOCK_TOKENS), caches[0]), runner.run


def test_every_step_has_the_bits_of_an_eager_one(runs: tuple[Run, Run]) -> None:
    eager, replayed = runs
    rng = random.Random(1)
    for _ in range(40):
        blocks = rng.sample(range(1, NUM_BLOCKS), 3 * MAX_SEQUENCES)
        entries = [
            BatchEntry([rng.randrange(100)], rng.randrange(3 * BLOCK_TOKENS), blocks[3 * row : 3 * row + 3])
            for row in range(rng.randint(1, MAX_SEQUENCES))
        ]
        assert torch.equal(replayed(entries), eager(entries))


def test_a_step_that_does_not_fit_is_refused(runs: tuple[Run, Run]) -> None:
    _, replayed = runs
    for tokens, position in (([1, 2], 0), ([1], 16), ([1], -1), ([], 0)):
        with pytest.raises(ValueError, match="a step computes one token of each sequence"):
            replayed([BatchEntry(tokens, position, [1])])
    assert replayed([BatchEntry([1], 15, [1])]).isfinite().all()
