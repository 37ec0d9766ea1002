"""Folders of DeepSpeed's training: tags, ranks, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.checkpoint import (
    HUGGING_FACE,
    CheckpointError,
    MappingCheckpoint,
    PipelineCheckpointError,
    Sizes,
    TensorParallelCheckpoint,
    UnsupportedCheckpointError,
    open_any,
)
from tests.tiny_models import tiny_model

SIZES = Sizes(4, 2, 384)


def original() -> dict[str, Tensor]:
    return load_file(tiny_model("llama") / "model.safetensors")


def write(folder: Path, ranks: int = 1, key: str = "module", **more: object) -> None:
    """The tiny llama as its ranks' files."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = MappingCheckpoint(original())
    for rank in range(ranks):
        shard = TensorParallelCheckpoint([whole], HUGGING_FACE.sized(SIZES), rank, ranks)
        state = {name: shard.tensor(name).clone() for name in shard.names()}
        torch.save({key: state, "dp_world_size": 1, **more}, folder / f"mp_rank_{rank:02d}_model_states.pt")


def assert_is_original(source: Path, **more: object) -> None:
    checkpoint = open_any(source, allow_pickle=True, **{"sizes": SIZES, **more})  # type: ignore[arg-type]
    expected = original()
    assert checkpoint.names() == set(expected)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("key", ["module", "model"])
def test_latest_names_the_tag_and_the_tag_is_joined(ranks: int, key: str, tmp_path: Path) -> None:
    write(tmp_path / "global_step20", ranks, key, mp_world_size=ranks)
    (tmp_path / "latest").write_text("global_step20\n")
    assert_is_original(tmp_path)


def test_a_tag_wins_over_latest(tmp_path: Path) -> None:
    write(tmp_path / "steps" / "10")
    (tmp_path / "20").mkdir()
    torch.save({"module": {"x": torch.zeros(1)}}, tmp_path / "20" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("20")
    assert_is_original(tmp_path, tag="steps/10")
    assert open_any(tmp_path, allow_pickle=True).names() == {"x"}
    assert_is_original(tmp_path / "steps" / "10")


def test_the_folder_itself_without_a_tag(tmp_path: Path) -> None:
    write(tmp_path)
    assert_is_original(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384}')
    write(tmp_path, 2)
    assert_is_original(tmp_path, sizes=None)


def test_a_tag_may_hold_any_form(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("export")
    (tmp_path / "export").symlink_to(tiny_model("llama"))
    assert_is_original(tmp_path)


@pytest.mark.parametrize("tag", ["", "..", "../outside", ".", "a/../..", "/etc", "a\0b"])
def test_no_tag_leaves_the_folder(tag: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    with pytest.raises(CheckpointError, match="is no folder in"):
        open_any(folder, tag=tag)
    (folder / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match=r"latest .* is no folder in"):
        open_any(folder)


def test_a_tag_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"the tag 'step9': there is no {tmp_path}/step9"):
        open_any(tmp_path, tag="step9")
    (tmp_path / "latest").write_text("step9")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/latest 'step9': there is no {tmp_path}/step9"):
        open_any(tmp_path)
    (tmp_path / "latest").write_text("x" * 5000)
    with pytest.raises(CheckpointError, match="is no tag: it has 5000 bytes"):
        open_any(tmp_path)
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"file\.safetensors is no folder, so it has no tag 'x'"):
        open_any(tmp_path / "file.safetensors", tag="x")


@pytest.mark.parametrize("layer", ["layer_03-model_00-model_states.pt", "layer_11-model_states.pt"])
def test_a_pipeline_is_refused(layer: str, tmp_path: Path) -> None:
    write(tmp_path / "step1")
    (tmp_path / "step1" / layer).touch()
    (tmp_path / "latest").write_text("step1")
    with pytest.raises(RuntimeError) as raised:
        open_any(tmp_path, allow_pickle=True)
    assert str(raised.value) == "pipeline parallelism is currently not supported in inference."
    assert isinstance(raised.value, PipelineCheckpointError)
    assert isinstance(raised.value, CheckpointError)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "experts' files, which are not read: layer_0_expert_3"),
        ("expert_3_mp_rank_00_model_states.pt", "experts' files"),
    ],
)
def test_experts_are_not_left_out_in_silence(more: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / more).touch()
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        open_any(tmp_path, allow_pickle=True)


def test_parts_of_zero_need_its_script(tmp_path: Path) -> None:
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(UnsupportedCheckpointError, match=r"zero_to_fp32\.py"):
        open_any(tmp_path, allow_pickle=True)


def test_both_keys_and_neither(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    state = {"a": torch.zeros(1)}
    for contents, text in (
        ({"module": state, "model": state}, "checkpoint has both 'model' and 'module' keys, not sure how to proceed"),
        ({"state": state}, "checkpoint contains neither 'model' or 'module' keys, not sure how to proceed"),
        (state, "checkpoint contains neither 'model' or 'module' keys, not sure how to proceed"),
    ):
        torch.save(contents, path)
        with pytest.raises(AssertionError, match=text) as raised:
            open_any(tmp_path, allow_pickle=True)
        assert str(path) in str(raised.value)
        assert isinstance(raised.value, CheckpointError)
    for contents, text in (
        ([state], "does not hold a dictionary"),
        ({"module": 3}, "'module' is no state dict but int"),
    ):
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match=text):
            open_any(tmp_path, allow_pickle=True)


def test_ranks_that_are_missing(tmp_path: Path) -> None:
    write(tmp_path, 2, mp_world_size=2)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is pickle.*--allow-pickle"):
        open_any(tmp_path)
    (tmp_path / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(AssertionError, match="checkpoint count 1 is different from saved mp_world_size 2"):
        open_any(tmp_path, allow_pickle=True)
    write(tmp_path, 2)
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the file of rank 0: mp_rank_00_model_states\.pt"):
        open_any(tmp_path, allow_pickle=True)


def test_shards_of_different_shape_are_named(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / "mp_rank_01_model_states.pt"
    state = torch.load(path)["module"]
    name = "model.layers.0.mlp.down_proj.weight"
    torch.save({"module": {**state, name: state[name][:-1].clone()}}, path)
    checkpoint = open_any(tmp_path, allow_pickle=True, sizes=SIZES)
    with pytest.raises(CheckpointError, match=rf"{name} is .*\[64, 48\] in .*rank_00.*, but .*\[63, 48\] in .*rank_01"):
        checkpoint.tensor(name)
    del state[name]
    torch.save({"module": state}, path)
    with pytest.raises(
        CheckpointError, match=rf"shard of rank 1 in {path} lacks {name}, which others have in .*rank_00"
    ):
        open_any(tmp_path, allow_pickle=True, sizes=SIZES)
