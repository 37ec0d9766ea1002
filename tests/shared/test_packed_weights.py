"""Packed weights in a file: the same tensors, made once, whole or not at all, and never in the way of serving."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels import linear
from shared.batch import BatchEntry, build_batch
from shared.checkpoint import open_checkpoint
from shared.config import QuantizationMode, load_config
from shared.engine import Engine, EnginePlan
from shared.kv_cache import KvCache, KvLayout
from shared.model_files import ModelFiles, find_weights
from shared.model_store import ModelStore
from shared.models.decoder import Decoder
from shared.models.loading import load_weights, packing_of
from shared.models.quantization import QuantizationPlan
from shared.models.weights import ModelWeights
from shared.packed_weights import share_packed
from shared.policies.table import architecture_of

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tandem" / "packed"


class Packing:
    """Makes tensors, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, Tensor]:
        self.count += 1
        return {"a": torch.arange(100.0).view(4, 25), "b": torch.ones(3).bfloat16()}


def share(pack: Callable[[], dict[str, Tensor]], *parts: str) -> dict[str, Tensor]:
    return share_packed(parts or ("model", "float32"), pack)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_they_are_packed_once(cache: Path) -> None:
    pack = Packing()
    first, second = share(pack), share(pack)
    assert pack.count == 1
    assert equal(first, second)
    assert equal(first, Packing()())
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".safetensors"]


def test_what_decides_the_bytes_decides_the_file(cache: Path) -> None:
    pack = Packing()
    for parts in (("model", "float32"), ("model", "bfloat16"), ("other", "float32")):
        share(pack, *parts)
    assert pack.count == 3


def test_they_are_mapped_and_not_read(cache: Path) -> None:
    """Two processes with the same file share its pages: the mapping names it, and is no memory of their own."""
    share(lambda: {"a": torch.ones(1 << 20)})
    tensor = share(Packing())["a"]
    address = tensor.data_ptr()
    [line] = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    ]
    assert line.endswith(".safetensors")


def test_a_file_that_is_not_whole_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack = Packing()
    share(pack)
    [path] = cache.glob("*.safetensors")
    for broken in (path.read_bytes()[:-10], b"", b"{}" * 40):
        path.write_bytes(broken)
        assert equal(share(pack), Packing()())
    assert pack.count == 4
    assert "is not whole" in caplog.text


def test_a_killed_writer_is_written_over(cache: Path) -> None:
    share(Packing())
    [path] = cache.glob("*.safetensors")
    path.rename(path.with_suffix(".unfinished"))
    assert equal(share(Packing()), Packing()())
    assert not list(cache.glob("*.unfinished"))


def test_a_cache_that_cannot_be_written_is_told_and_served_without(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert equal(share(Packing()), Packing()())
    assert "not shared with other workers" in caplog.text


def test_a_failure_of_the_packing_is_not_hidden(cache: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise ValueError("no such parameter")

    with pytest.raises(ValueError, match="no such parameter"):
        share(fail)
    assert equal(share(Packing()), Packing()())


def test_a_small_model_leaves_nothing_in_the_cache(cache: Path, tiny_model: Callable[[str], Path]) -> None:
    config = load_config(None, {"model": str(tiny_model("llama")), "dtype": "float32", "decode": {"num_blocks": 4}})
    Engine(EnginePlan.of(config, config.decode, ModelStore().resolve(config.model))).close()
    assert not cache.exists()


def test_how_it_is_quantized_decides_the_file() -> None:
    plans = [QuantizationPlan.of_mode(mode) for mode in get_args(QuantizationMode)]
    plans += [QuantizationPlan.of_mode("int8", exclude) for exclude in (("lm_head",), ("lm_head", "*.down"))]
    assert len({packing_of(plan, torch.bfloat16) for plan in plans}) == len(plans) > 7
    assert "group=32" in packing_of(QuantizationPlan.of_mode("int4"), torch.bfloat16), "or another would find its file"


def test_what_the_cpu_multiplies_decides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    packings = set()
    for has_pairs in (False, True):
        monkeypatch.setattr(linear, "_cpu_has_pairs", lambda has_pairs=has_pairs: has_pairs)
        packings.add(packing_of(QuantizationPlan(), torch.bfloat16))
        packings.add(packing_of(QuantizationPlan(), torch.float32))
    assert len(packings) == 2


def test_processes_that_start_at_once_pack_once(cache: Path, tmp_path: Path) -> None:
    code = f"""
import torch
from shared.packed_weights import share_packed
def pack():
    with open({str(tmp_path / "packed_by")!r}, "a") as file:
        file.write("x")
    return {{"a": torch.arange(1 << 20)}}
assert share_packed(("model",), pack)["a"][-1] == (1 << 20) - 1
"""
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert (tmp_path / "packed_by").read_text() == "x"


@pytest.mark.parametrize("quantization", get_args(QuantizationMode))
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_decoder_over_mapped_weights_has_the_same_bits(
    kind: str, quantization: QuantizationMode, cache: Path, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(kind)
    files = ModelFiles(kind, folder, find_weights(folder), "")
    architecture = architecture_of(files.config)
    plan = QuantizationPlan.of_mode(quantization)
    weights = load_weights(architecture, open_checkpoint(files), dtype=torch.float32, device="cpu", quantization=plan)
    tensors = share(weights.tensors)
    mapped = ModelWeights.from_tensors(architecture, tensors)
    assert mapped.tensors().keys() == tensors.keys()
    batch = build_batch([BatchEntry(list(range(3, 40)), 0, [1, 2, 3], "all")], 16)
    logits = [
        Decoder(architecture, one).forward(batch, KvCache(KvLayout.of(architecture, "", "float32", 16), 8))
        for one in (weights, mapped)
    ]
    assert torch.equal(*logits)
