"""`open_any`: one model in every form, the same parameters and the same packed weights from each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint import (
    HUGGING_FACE,
    CheckpointError,
    Cut,
    CutTable,
    Sizes,
    open_any,
    save_flat,
    save_mp_checkpoint,
)
from shared.model_files import ModelError
from shared.models.loading import load_weights
from shared.policies.table import architecture_of
from tests.shared.checkpoint.test_safetensors import files_in
from tests.shared.checkpoint.test_training_folder import write as write_training
from tests.shared.test_model_store import sharded
from tests.tiny_models import tiny_gguf, tiny_model

WHOLE = load_file(tiny_model("llama") / "model.safetensors")


def indexed(folder: Path) -> Path:
    return sharded(Path(shutil.copytree(tiny_model("llama"), folder / "model")))


def pickled(folder: Path) -> Path:
    torch.save(WHOLE, folder / "pytorch_model.bin")
    return folder


def tagged(folder: Path) -> Path:
    write_training(folder / "step7", 2)
    (folder / "latest").write_text("step7")
    return folder


def listed(folder: Path) -> Path:
    indexed(folder)
    files = sorted(path.name for path in (folder / "model").glob("*.safetensors"))
    description = {"type": "ds_model", "checkpoints": files, "version": 1.0, "base_dir": "model"}
    (folder / "checkpoint.json").write_text(json.dumps(description))
    return folder / "checkpoint.json"


def cut(folder: Path) -> Path:
    return save_mp_checkpoint(folder, WHOLE, HUGGING_FACE.sized(Sizes(4, 2, 384)), 2)


def flat(folder: Path) -> Path:
    save_flat(folder, WHOLE)
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: tiny_model("llama"),
    "index": indexed,
    "index file": lambda folder: indexed(folder) / "model.safetensors.index.json",
    "file": lambda folder: tiny_model("llama") / "model.safetensors",
    "pickle": pickled,
    "state dict": lambda folder: pickled(folder) / "pytorch_model.bin",
    "tag": tagged,
    "description": listed,
    "shards": cut,
    "flat": flat,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(form: str, tmp_path: Path) -> None:
    checkpoint = open_any(FORMS[form](tmp_path), allow_pickle=True, sizes=Sizes(4, 2, 384))
    assert checkpoint.names() == set(WHOLE)
    for name, value in WHOLE.items():
        found = checkpoint.tensor(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name
    architecture = architecture_of(files_in(tiny_model("llama")).config)
    packed = load_weights(architecture, checkpoint, dtype=torch.float32, device="cpu").tensors()
    expected = load_weights(architecture, open_any(tiny_model("llama")), dtype=torch.float32, device="cpu").tensors()
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_of_every_form(form: str, tmp_path: Path) -> None:
    source = FORMS[form](tmp_path)
    for rank in range(2):
        part = open_any(source, allow_pickle=True, sizes=Sizes(4, 2, 384), rank=rank, ranks=2)
        up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(part.tensor(up), WHOLE[up].chunk(2)[rank])
        assert torch.equal(part.tensor(down), WHOLE[down].chunk(2, 1)[rank])
        assert torch.equal(part.tensor("model.norm.weight"), WHOLE["model.norm.weight"])


def test_gguf() -> None:
    assert open_any(tiny_gguf()).names() == set(WHOLE)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    save_file({"odd.weight": torch.arange(8.0)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.weight: no rule says how it is cut for 2 ranks"):
        open_any(tmp_path, ranks=2).tensor("odd.weight")
    table = CutTable(((r"odd\.weight", Cut(0)),))
    assert open_any(tmp_path, table=table, rank=1, ranks=2).tensor("odd.weight").tolist() == [4, 5, 6, 7]


def test_what_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"there is no {tmp_path}/none"):
        open_any(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no weights"):
        open_any(tmp_path)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=r"weights\.npz is no \.safetensors, \.gguf, \.json or \.pt"):
        open_any(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match="rank must be one of 2, got 2"):
        open_any(tmp_path, rank=2, ranks=2)
    (tmp_path / "model.safetensors").symlink_to(tiny_model("llama") / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 3}')
    with pytest.raises(CheckpointError, match=r"config\.json: 4 heads cannot share 3 key-value heads"):
        open_any(tmp_path, ranks=2)
