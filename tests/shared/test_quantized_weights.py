"""Quantized weights: the same bits whenever they are made, never beside all floats, and out of a file as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.batch import BatchEntry, build_batch
from shared.checkpoint import Checkpoint, open_any, open_checkpoint, save_mp_checkpoint
from shared.checkpoint.cut_tables import table_for
from shared.checkpoint.cuts import Sizes
from shared.checkpoint.recast import RecastCheckpoint
from shared.config import QuantizationMode
from shared.engine.saving import quantized_of
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights
from shared.models.architecture import Architecture
from shared.models.decoder import Decoder
from shared.models.loading import load_weights
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights
from shared.policies.table import architecture_of, policy_for
from tests.live_bytes import LiveBytes, bytes_of
from tests.tiny_models import deep_model, tiny_model

MODES: tuple[QuantizationMode, ...] = ("int8", "int8_dynamic", "int4", "fp8", "fp6")
EXCLUDE = ("layers.1.*", "*.down")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices this small more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(folder: Path) -> tuple[Architecture, Checkpoint]:
    files = ModelFiles("x", folder, find_weights(folder), "")
    return architecture_of(files.config), open_checkpoint(files)


def load(folder: Path, plan: QuantizationPlan, dtype: torch.dtype = torch.bfloat16) -> ModelWeights:
    architecture, checkpoint = opened(folder)
    return load_weights(architecture, checkpoint, dtype=dtype, device="cpu", quantization=plan)


def is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(architecture: Architecture, weights: ModelWeights) -> Tensor:
    batch = build_batch([BatchEntry(list(range(3, 40)), 0, [1, 2, 3], "all")], 16)
    layout = KvLayout.of(architecture, "", str(weights.embedding.dtype).removeprefix("torch."), 16)
    return Decoder(architecture, weights).forward(batch, KvCache(layout, 8)).clone()


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased", "qwen2_moe"])
def test_bits_made_while_loading_are_those_made_afterwards(
    kind: str, dtype: torch.dtype, mode: QuantizationMode
) -> None:
    plain = load(tiny_model(kind), QuantizationPlan(), dtype)
    for exclude in ((), EXCLUDE, ("lm_head",)):
        plan = QuantizationPlan.of_mode(mode, exclude)
        while_loading = load(tiny_model(kind), plan, dtype)
        assert is_same(while_loading.tensors(), plain.quantized(plan).tensors())
        assert not is_same(while_loading.tensors(), plain.tensors())
    assert is_same(plain.quantized(QuantizationPlan()).tensors(), plain.tensors())
    with pytest.raises(ValueError, match=r"layers\.0\.qkv: int8 .* cannot be quantized again"):
        plain.quantized(QuantizationPlan.of_mode("int8")).quantized(plan)


@every_mode
def test_what_is_excluded_is_as_it_was(mode: QuantizationMode) -> None:
    weights = load(tiny_model("llama-untied-biased"), QuantizationPlan.of_mode(mode, EXCLUDE))
    for index, layer in enumerate(weights.layers):
        for name, part in (("qkv", layer.qkv), ("output", layer.output), ("up", layer.up), ("down", layer.down)):
            assert part
            assert (part.quantization is None) == (index == 1 or name == "down"), (index, name)
    assert weights.lm_head
    assert weights.lm_head.form == "int8"


@every_mode
def test_the_floats_of_a_model_are_never_all_there(mode: QuantizationMode) -> None:
    """Beside what is left in the end lives what makes one matrix: its floats, in float64 while they are rounded."""
    _, checkpoint = opened(deep_model())
    sizes = {name: checkpoint.tensor(name).nbytes for name in checkpoint.names()}
    largest, floats = max(sizes.values()), sum(sizes.values())
    with LiveBytes() as live:
        weights = load(deep_model(), QuantizationPlan.of_mode(mode))
    final = bytes_of(weights.tensors())
    assert final < 0.7 * floats
    assert live.peak < final + 16 * largest < 0.95 * floats
    with LiveBytes() as afterwards:
        load(deep_model(), QuantizationPlan(), torch.bfloat16).quantized(QuantizationPlan.of_mode(mode))
    assert afterwards.peak > floats, "or it does not count"


@every_mode
@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_saved_and_read_again_they_are_the_same(kind: str, mode: QuantizationMode, tmp_path: Path) -> None:
    """As a checkpoint, of integers by the model's own names, and as they are packed."""
    architecture, checkpoint = opened(tiny_model(kind))
    plan = QuantizationPlan.of_mode(mode, ("layers.1.*",))
    weights = load(tiny_model(kind), plan)
    expected = logits(architecture, weights)

    policy = policy_for(ModelFiles("x", tiny_model(kind), find_weights(tiny_model(kind)), "").config)
    quantized = quantized_of(policy, architecture, checkpoint.names(), plan)
    assert "model.layers.0.self_attn.k_proj.weight" in quantized
    assert "model.layers.1.self_attn.k_proj.weight" not in quantized
    recast = RecastCheckpoint(checkpoint, torch.bfloat16, quantized)
    table = table_for(checkpoint.names()).sized(Sizes(4, 2, 384))
    save_mp_checkpoint(tmp_path, recast, table, tp_size=1)
    saved = open_any(tmp_path)
    assert {name for name in saved.names() if saved.integers(name) is not None} == quantized.keys()
    again = load_weights(architecture, saved, dtype=torch.bfloat16, device="cpu", quantization=plan)
    assert is_same(again.tensors(), weights.tensors())
    assert torch.equal(logits(architecture, again), expected)

    save_file(weights.tensors(), tmp_path / "packed.safetensors")
    packed = ModelWeights.from_tensors(architecture, load_file(tmp_path / "packed.safetensors"))
    assert is_same(packed.tensors(), weights.tensors())
    assert torch.equal(logits(architecture, packed), expected)
