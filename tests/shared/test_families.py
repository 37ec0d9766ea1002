"""Every family against transformers: whole prompts, chunks, steps, sequences of any lengths together, and a sequence
that goes on in another pool."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shared.batch import BatchEntry, build_batch
from shared.checkpoint import open_checkpoint
from shared.engine import init_inference
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.policies.table import POLICIES, architecture_of
from tests.tiny_models import KINDS, tiny_model

BLOCK_TOKENS = 16
LENGTHS = (1, 15, 17, 50)
NUM_GENERATED = 8


@functools.cache
def decoder(kind: str) -> Decoder:
    folder = tiny_model(kind)
    files = ModelFiles(kind, folder, find_weights(folder), "")
    architecture = architecture_of(files.config)
    return Decoder(architecture, load_weights(architecture, open_checkpoint(files), dtype=torch.float32, device="cpu"))


@functools.cache
def reference(kind: str) -> PreTrainedModel:
    # transformers' eager Falcon adds ALiBi twice
    attention = "sdpa" if kind == "falcon-alibi" else "eager"
    return AutoModelForCausalLM.from_pretrained(
        tiny_model(kind), dtype=torch.float32, attn_implementation=attention
    ).eval()


def new_cache(model: Decoder, num_blocks: int = 40) -> KvCache:
    return KvCache(KvLayout.of(model.architecture, "", "float32", BLOCK_TOKENS), num_blocks)


def run(model: Decoder, kv: KvCache, *entries: BatchEntry) -> Tensor:
    return model.forward(build_batch(entries, BLOCK_TOKENS), kv)


def random_tokens(model: Decoder, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, model.architecture.vocab_size, (count,), generator=generator).tolist()


@torch.inference_mode()
def expected_logits(kind: str, tokens: Sequence[int]) -> Tensor:
    return reference(kind)(torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str) -> None:
    model = decoder(kind)
    prompts = [random_tokens(model, length) for length in LENGTHS]
    tables = [tuple(range(1 + 5 * row, 6 + 5 * row)) for row in range(len(prompts))]
    kv = new_cache(model)
    entries = [BatchEntry(tokens, 0, table, "all") for tokens, table in zip(prompts, tables, strict=True)]
    together = run(model, kv, *entries)
    expected = torch.cat([expected_logits(kind, tokens) for tokens in prompts])
    assert expected.std() > 0.3, "flat logits would prove nothing"
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)

    # the longest in chunks, into other blocks
    tokens, table = prompts[-1], (39, 2, 30, 7, 21)
    kv_of_chunks = new_cache(model)
    chunks = [
        run(model, kv_of_chunks, BatchEntry(tokens[start:end], start, table, "all"))
        for start, end in ((0, 7), (7, 23), (23, 24), (24, 50))
    ]
    assert torch.equal(torch.cat(chunks), together[-50:])

    # steps of all of them, the longest moved to another pool before
    moved = new_cache(model)
    for source, target in zip(table, range(11, 16), strict=True):
        moved.block(target).copy_(kv_of_chunks.block(source))
    histories = [list(tokens) for tokens in prompts]
    alone = list(prompts[-1])
    last = together[torch.tensor([0, 15, 32, 82])]
    last_alone = together[-1:]
    for _ in range(NUM_GENERATED):
        for history, row in zip(histories, last, strict=True):
            history.append(int(row.argmax()))
        alone.append(int(last_alone[0].argmax()))
        last = run(
            model, kv, *(BatchEntry(h[-1:], len(h) - 1, table) for h, table in zip(histories, tables, strict=True))
        )
        last_alone = run(model, moved, BatchEntry(alone[-1:], len(alone) - 1, range(11, 16)))
        assert torch.equal(last_alone, last[-1:])
    for prompt, history in zip(prompts, histories, strict=True):
        logits = expected_logits(kind, history)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == history[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "mixtral"])
def test_float16_is_nearer_than_bfloat16(kind: str) -> None:
    """What `init_inference` computes in by itself, with soft caps, ALiBi and experts too."""
    tokens = random_tokens(decoder(kind), 30)
    expected, errors = expected_logits(kind, tokens), {}
    for dtype in (torch.float16, torch.bfloat16):
        engine = init_inference(tiny_model(kind), kernel_inject=True, dtype=dtype, max_out_tokens=64)
        try:
            errors[dtype] = (engine(torch.tensor([tokens])).logits[0] - expected).abs().mean() / expected.std()
        finally:
            engine.destroy()
    assert 0 < errors[torch.float16] < errors[torch.bfloat16] / 3
    assert errors[torch.float16] < 0.01


def test_every_family_of_language_models_has_a_kind() -> None:
    of_kinds = {fields["model_type"] for fields in KINDS.values()}
    decoders = {family for family, policy in POLICIES.items() if policy.kind == "decoder"}
    assert decoders - of_kinds == {"qwen", "megatron_gpt_moe"}, "which transformers does not have"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    """Rows of a Hugging Face batch, padded at either end, have the logits that transformers gives each alone."""
    engine = init_inference(tiny_model(kind), kernel_inject=True, dtype="float32", max_out_tokens=64)
    try:
        rows = [random_tokens(decoder(kind), length) for length in (4, 21, 13)]
        width = 21
        for side in ("left", "right"):
            ids, mask = torch.zeros(2, 3, width, dtype=torch.int64)
            for row, tokens in enumerate(rows):
                columns = slice(width - len(tokens), width) if side == "left" else slice(len(tokens))
                ids[row, columns], mask[row, columns] = torch.tensor(tokens), 1
            logits = engine(ids, attention_mask=mask, use_cache=False).logits
            for row, tokens in enumerate(rows):
                expected = expected_logits(kind, tokens)
                torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=1e-4, atol=1e-4)
                # the last column always has the logits of the next token
                assert torch.equal(logits[row, -1], logits[row][mask[row].bool()][-1])
    finally:
        engine.destroy()
