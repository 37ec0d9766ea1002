"""The decoder against itself: a row has the same bits however its sequence is computed. test_families.py holds it
against transformers."""

import functools
import gc
import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from kernels.dtypes import DTYPES
from kernels.linear import LinearWeight
from kernels.quantization import Quantization
from shared.batch import NULL_BLOCK, BatchEntry, build_batch
from shared.checkpoint import CheckpointError, open_checkpoint
from shared.config import QuantizationMode
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.policies.table import architecture_of
from tests.tiny_models import smollm2, tiny_model

BLOCK_TOKENS = 16
NUM_GENERATED = 24
# One kind of each that attention, rope or norms treat differently.
DISTINCT_KINDS = ("llama", "llama-yarn", "mistral", "qwen2-sliding", "qwen3")


def load(files: ModelFiles, dtype: str, quantization: QuantizationMode = "none") -> Decoder:
    architecture = architecture_of(files.config)
    checkpoint = open_checkpoint(files)
    plan = QuantizationPlan.of_mode(quantization)
    weights = load_weights(architecture, checkpoint, dtype=DTYPES[dtype], device="cpu", quantization=plan)
    return Decoder(architecture, weights)


@functools.cache
def decoder(kind: str, dtype: str = "float32") -> Decoder:
    folder = tiny_model(kind)
    return load(ModelFiles(kind, folder, find_weights(folder), ""), dtype)


def new_cache(model: Decoder, dtype: str = "float32", num_blocks: int = 64) -> KvCache:
    return KvCache(KvLayout.of(model.architecture, "", dtype, BLOCK_TOKENS), num_blocks)


def random_tokens(model: Decoder, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.architecture.vocab_size, (count,), generator=generator).tolist()


def run(model: Decoder, kv: KvCache, *entries: BatchEntry) -> Tensor:
    return model.forward(build_batch(entries, BLOCK_TOKENS), kv)


def in_chunks(model: Decoder, kv: KvCache, tokens: Sequence[int], sizes: Iterator[int], table: Sequence[int]) -> Tensor:
    """The logits of every token, computed chunk by chunk."""
    rows, start = [], 0
    while start < len(tokens):
        chunk = tokens[start : start + next(sizes)]
        rows.append(run(model, kv, BatchEntry(chunk, start, table, "all")))
        start += len(chunk)
    return torch.cat(rows)


def greedy(model: Decoder, prompt: Sequence[int], count: int, dtype: str = "float32") -> list[int]:
    kv, table, tokens = new_cache(model, dtype), range(1, 40), list(prompt)
    logits = run(model, kv, BatchEntry(tokens, 0, table))
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits[0].argmax()))
        logits = run(model, kv, BatchEntry(tokens[-1:], len(tokens) - 1, table))
    return tokens[len(prompt) :]


@torch.inference_mode()
def is_greedy(model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int]) -> bool:
    """Whether transformers would have chosen each of these tokens after those before it."""
    logits = model(torch.tensor([[*prompt, *generated]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(generated)


def test_sliding_window_is_in_force() -> None:
    """Tokens before the window change nothing within one layer's reach, and would without a window."""
    model = decoder("mistral")
    assert set(model.architecture.sliding_window) == {24}
    reach = 3 * 23 + 1  # each of three layers looks 23 tokens back
    tokens = random_tokens(model, reach + 10)
    changed = [*random_tokens(model, 10, seed=1), *tokens[10:]]
    last = [run(model, new_cache(model), BatchEntry(prompt, 0, range(1, 9))) for prompt in (tokens, changed)]
    assert torch.equal(last[0], last[1])
    full = decoder("llama")
    last = [run(full, new_cache(full), BatchEntry(prompt, 0, range(1, 9))) for prompt in (tokens, changed)]
    assert not torch.equal(last[0], last[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DISTINCT_KINDS)
def test_same_bits_however_it_is_chunked(kind: str, dtype: str) -> None:
    model = decoder(kind, dtype)
    tokens = random_tokens(model, 70)
    whole = run(model, new_cache(model, dtype), BatchEntry(tokens, 0, range(1, 7), "all"))
    assert whole.isfinite().all()
    table = [33, 2, 60, 5, 17]  # any blocks in any order
    for sizes in ([1], [7], [16], [64], [55, 1], [1, 31]):
        kv = new_cache(model, dtype)
        repeating = iter(sizes * len(tokens))
        assert torch.equal(in_chunks(model, kv, tokens, repeating, table), whole), sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DISTINCT_KINDS)
def test_same_bits_among_neighbours(kind: str, dtype: str) -> None:
    """Prefill, continued prefill and decode in one batch, with padding rows and a null block full of NaN."""
    model = decoder(kind, dtype)
    sequences = [random_tokens(model, length, seed=length) for length in (1, 17, 33, 48, 70)]
    alone = []
    for tokens in sequences:
        kv = new_cache(model, dtype)
        alone.append(run(model, kv, BatchEntry(tokens, 0, range(1, 7), "all")))

    kv = new_cache(model, dtype)
    tables = [range(1 + 6 * index, 7 + 6 * index) for index in range(len(sequences))]
    cached = [0, 16, 32, 0, 69]
    for tokens, table, count in zip(sequences, tables, cached, strict=True):
        if count:
            run(model, kv, BatchEntry(tokens[:count], 0, table, "none"))
    kv.pool[0] = 0xFF  # NaN
    entries = [
        BatchEntry(tokens[count:], count, table, "all")
        for tokens, table, count in zip(sequences, tables, cached, strict=True)
    ]
    padding = [BatchEntry([0], 0, [NULL_BLOCK])] * 3
    logits = run(model, kv, *entries, *padding)
    expected = torch.cat([rows[count:] for rows, count in zip(alone, cached, strict=True)])
    assert torch.equal(logits[: len(expected)], expected)
    assert logits.shape[0] == len(expected) + 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(dtype: str) -> None:
    model = decoder("llama", dtype)
    tokens = random_tokens(model, 55)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(model, new_cache(model, dtype), BatchEntry(tokens, 0, range(1, 7), "all")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_half_the_bits_are_near_float32() -> None:
    """float16 has 3 more digits than bfloat16 has."""
    for kind in DISTINCT_KINDS:
        tokens = random_tokens(decoder(kind), 55)
        exact, bfloat16, float16 = (
            run(decoder(kind, dtype), new_cache(decoder(kind), dtype), BatchEntry(tokens, 0, range(1, 7), "all"))
            for dtype in DTYPES
        )
        assert 0 < (exact - bfloat16).abs().mean() < 0.05 * exact.std(), kind
        assert 0 < (exact - float16).abs().mean() < 0.05 / 4 * exact.std(), kind


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased"])
def test_quantized_equals_the_weights_that_its_integers_stand_for(
    kind: str, quantization: QuantizationMode, tmp_path: Path
) -> None:
    folder = tiny_model(kind)
    quantized = load(ModelFiles(kind, folder, find_weights(folder), ""), "float32", quantization)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    # the embedding itself stays, so the output layer is written apart from it
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            kind_of = Quantization(4, 32, symmetric=False) if quantization == "int4" else Quantization(8)
            weights[name] = LinearWeight(weight, None, kind_of).dequantize()
    weights["lm_head.weight"] = LinearWeight(head, None, Quantization(8)).dequantize()
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(weights, tmp_path / "model.safetensors")
    dense = load(ModelFiles(kind, tmp_path, find_weights(tmp_path), ""), "float32")

    tokens = random_tokens(quantized, 55)
    logits, expected, exact = (
        run(model, new_cache(model), BatchEntry(tokens, 0, range(1, 9), "all"))
        for model in (quantized, dense, decoder(kind))
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - exact).abs().mean() > 0.002 * exact.std(), "or nothing was quantized"


def test_only_wanted_rows() -> None:
    model = decoder("llama")
    tokens = random_tokens(model, 20)
    every = run(model, new_cache(model), BatchEntry(tokens, 0, (1, 2), "all"))
    assert torch.equal(run(model, new_cache(model), BatchEntry(tokens, 0, (1, 2), "last")), every[-1:])
    kv = new_cache(model)
    assert run(model, kv, BatchEntry(tokens[:-1], 0, (1, 2), "none")).shape == (0, 384)
    assert torch.equal(run(model, kv, BatchEntry(tokens[-1:], 19, (1, 2))), every[-1:])


def test_position_beyond_the_context_is_refused() -> None:
    model = decoder("llama")
    with pytest.raises(IndexError, match="position 2048 must be below 2048"):
        run(model, new_cache(model, num_blocks=200), BatchEntry([1], 2048, range(1, 130)))


def test_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama-untied-biased"), tmp_path / "tiny"))
    tensors = load_file(folder / "model.safetensors")

    def loaded(**changes: object) -> Decoder:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return load(ModelFiles("tiny", folder, find_weights(folder), ""), "float32")

    with pytest.raises(CheckpointError, match=r"12 not expected by this family \(model\.layers\.0\.self_attn\.k_proj"):
        loaded(attention_bias=False)
    with pytest.raises(CheckpointError, match=r"but config\.json says"):
        loaded(attention_bias=True, intermediate_size=104)
    missing = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(missing, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight\)"):
        loaded(intermediate_size=96)
    loaded(tie_word_embeddings=True).close()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded(tie_word_embeddings=True).close()  # carries the tied layer a second time


def test_close_frees_the_weights() -> None:
    folder = tiny_model("llama")
    model = load(ModelFiles("llama", folder, find_weights(folder), ""), "float32")
    embedding = weakref.ref(model._weights.embedding)
    model.close()
    gc.collect()
    assert embedding() is None


@pytest.mark.slow  # tests/e2e/test_huggingface.py has the same model answer as transformers does
def test_smollm2_equals_transformers(default_reference: PreTrainedModel) -> None:
    """The real model from its GGUF file, both read in float32."""
    files = smollm2()
    model = load(files, "float32")
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    text = "The three primary colours are red, yellow and blue. def fibonacci(n):\n    return"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    for prompt in (tokenizer.encode(text), tokenizer.encode(chat)):
        logits = run(model, new_cache(model), BatchEntry(prompt, 0, range(1, 9), "all"))
        with torch.inference_mode():
            expected = default_reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        generated = greedy(model, prompt, NUM_GENERATED)
        assert is_greedy(default_reference, prompt, generated)
    assert "Paris" in tokenizer.decode(generated)
