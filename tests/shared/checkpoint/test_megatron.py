"""Megatron's files in every version, at any degree, against a model written row by row."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.quantization import Integers
from shared.checkpoint import (
    Checkpoint,
    CheckpointError,
    MappingCheckpoint,
    Sizes,
    UnsupportedCheckpointError,
    megatron_checkpoint,
    open_any,
)
from shared.checkpoint.megatron import flat_name, flattened
from tests.shared.checkpoint.megatron_files import HEADS, VERSIONS, VOCAB, Gpt2

SIZES = Sizes(HEADS, None, VOCAB)
DEGREES = (1, 2, 4)


def assert_equal(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert checkpoint.names() == set(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value), name


def described(paths: list[Path], version: float | None) -> dict[str, object]:
    return {"type": "Megatron", "checkpoints": [str(path) for path in paths], "version": version}


@pytest.mark.parametrize("ranks", DEGREES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_and_degree_is_the_same_model(version: float, ranks: int, tmp_path: Path) -> None:
    model = Gpt2()
    paths = model.write(tmp_path / "global_step3", ranks, version)
    (tmp_path / "latest").write_text("global_step3\n")
    sources = (tmp_path, tmp_path / "global_step3", described(paths, version), described(paths, None))
    for source in sources:
        assert_equal(open_any(source, allow_pickle=True, sizes=SIZES), model.flat())


@pytest.mark.parametrize(("stored", "ranks"), [*itertools.product(DEGREES, DEGREES)])
@pytest.mark.parametrize("version", VERSIONS[:3])
def test_files_are_merged_and_split(version: float, stored: int, ranks: int, tmp_path: Path) -> None:
    model = Gpt2()
    source = described(model.write(tmp_path, stored, version), version)
    for rank in range(ranks):
        checkpoint = open_any(source, allow_pickle=True, sizes=SIZES, rank=rank, ranks=ranks)
        assert_equal(checkpoint, model.rank(rank, ranks))


def test_flat_files_too(tmp_path: Path) -> None:
    """Names as they are documented, in safetensors and in a state dict that is not nested."""
    model = Gpt2()
    paths = []
    for rank in range(2):
        shard = {name: value.clone() for name, value in model.shard(rank, 2, 2.0).items()}
        paths.append(tmp_path / f"{rank}.safetensors")
        save_file(shard, paths[-1])
        torch.save({"model": shard}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    assert_equal(open_any(described(paths, 2.0), sizes=SIZES), model.flat())
    pickles = described(sorted(tmp_path.glob("*.pt")), 2.0)
    assert_equal(open_any(pickles, allow_pickle=True, sizes=SIZES), model.flat())


def test_version_0_needs_no_heads_and_no_vocabulary_keeps_its_padding(tmp_path: Path) -> None:
    model = Gpt2()
    model.write(tmp_path, 4, 0)
    found = open_any(tmp_path, allow_pickle=True)
    expected = model.flat()
    padded = torch.cat([expected.pop("word_embeddings.weight"), torch.zeros(2, 12)])
    assert torch.equal(found.tensor("word_embeddings.weight"), padded)
    assert all(torch.equal(found.tensor(name), value) for name, value in expected.items())


def test_sizes_of_the_config_beside_it(tmp_path: Path) -> None:
    model = Gpt2()
    model.write(tmp_path, 2, 2.0)
    (tmp_path / "config.json").write_text('{"n_head": 4, "vocab_size": 10}')
    assert_equal(open_any(tmp_path, allow_pickle=True), model.flat())


def test_integers_are_ordered_with_their_scales() -> None:
    """Row i of the fused weight has i in it, and the scale i."""
    name = "transformer.layers.0.attention.query_key_value.weight"
    rows = torch.arange(3 * 2 * 4)
    weight = Integers(8, rows[:, None].expand(24, 8).to(torch.int8).contiguous(), rows[:, None].float())
    others = {key: torch.zeros(1) for key in Gpt2().tensors if "layers.0" in key}
    checkpoint = megatron_checkpoint([MappingCheckpoint({**others, name: weight})], 2.0, sizes=Sizes(2))
    found = checkpoint.integers(name)
    assert found is not None
    expected = [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19, 8, 9, 10, 11, 20, 21, 22, 23]
    assert found.scale.flatten().tolist() == expected
    assert found.values[:, 0].tolist() == expected
    assert checkpoint.integers("transformer.layers.0.attention.dense.weight") is None
    floats = megatron_checkpoint([MappingCheckpoint({**others, name: rows[:, None]})], 2.0, sizes=Sizes(2))
    assert floats.tensor(name).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("language_model.embedding.word_embeddings.weight", "word_embeddings.weight"),
        ("module.language_model.embedding.position_embeddings.weight", "position_embeddings.weight"),
        ("language_model.encoder.layers.11.self_attention.dense.bias", "transformer.layers.11.attention.dense.bias"),
        ("transformer.final_layernorm.weight", "transformer.final_layernorm.weight"),
        ("language_model.encoder.final_layernorm.bias", "transformer.final_layernorm.bias"),
        ("language_model.output_layer.weight", "output_layer.weight"),
    ],
)
def test_flat_names(name: str, flat: str) -> None:
    assert flat_name(name) == flat


def test_nesting_is_bounded() -> None:
    endless: dict[str, object] = {}
    endless["a"] = endless
    with pytest.raises(CheckpointError, match="nested more than 16 deep"):
        list(flattened(endless))


@pytest.mark.parametrize("version", [0.5, 1.5, -1, True, "2.0", float("nan"), float("inf")])
def test_a_version_that_is_none(version: object, tmp_path: Path) -> None:
    paths = Gpt2().write(tmp_path, 1, 0)
    with pytest.raises(AssertionError, match=f"checkpoint version: {version} is not supported"):
        open_any({**described(paths, 0), "version": version}, allow_pickle=True, sizes=SIZES)


def test_what_does_not_go_together_is_named(tmp_path: Path) -> None:
    model = Gpt2()
    two = model.write(tmp_path / "two", 2, 2.0)

    def opened(source: object, **more: object) -> Checkpoint:
        return open_any(source, allow_pickle=True, **{"sizes": SIZES, **more})  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match=r"says version 0, but .*mp_rank_00.* has checkpoint_version 2\.0"):
        opened(described(two, 0))
    with pytest.raises(CheckpointError, match=r"mixed head by head in .*mp_rank_00.*: give the number of heads"):
        opened(tmp_path / "two", sizes=Sizes())
    with pytest.raises(CheckpointError, match=r"key_value\.weight: 3 heads cannot lie in 2 files in .*mp_rank_00"):
        opened(tmp_path / "two", sizes=Sizes(3))
    with pytest.raises(UnsupportedCheckpointError, match="fewer key-value heads"):
        opened(tmp_path / "two", sizes=Sizes(4, 2))
    with pytest.raises(AssertionError, match="Invalid checkpoints and world size for sd split: 2 files for 3 ranks"):
        opened(tmp_path / "two", ranks=3)
    four = model.write(tmp_path / "four", 4, 2.0)
    with pytest.raises(AssertionError, match="Invalid checkpoints and world size for sd merge: 4 files for 3 ranks"):
        opened(tmp_path / "four", ranks=3)
    with pytest.raises(AssertionError, match="checkpoint count 3 is different from saved mp_world_size 4"):
        opened(described(four[:3], 2.0))
    model.write(tmp_path / "one", 2, 1.0)
    (tmp_path / "one" / two[0].name).write_bytes(two[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"mp_rank_00.* has checkpoint_version 2\.0, and .*mp_rank_01.* 1\.0"):
        opened(tmp_path / "one")
    model.write(tmp_path / "whole", 1, 2.0)
    whole = opened(tmp_path / "whole", sizes=Sizes(5))
    with pytest.raises(CheckpointError, match=r"key_value\.weight in .*mp_rank_00.* has 36 rows, which are not 3 x 5"):
        whole.tensor("transformer.layers.0.attention.query_key_value.weight")


@pytest.mark.parametrize("lost", ["dense_4h_to_h.weight", "attention.query_key_value", "dense_h_to_4h.bias"])
def test_a_file_without_megatrons_layers(lost: str, tmp_path: Path) -> None:
    shard = {name: value for name, value in Gpt2().shard(0, 1, 0).items() if lost not in name}
    torch.save({"module": shard}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"key: {lost} is not found in the checkpoint in .*x\.pt"):
        open_any(described([tmp_path / "x.pt"], 0), allow_pickle=True)
