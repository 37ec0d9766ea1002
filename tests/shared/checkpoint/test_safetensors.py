"""Safetensors files: whole, in shards, cut short, and with integers in them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.quantization import Integers, floats_of
from shared.checkpoint import CheckpointError, SafetensorsCheckpoint, open_checkpoint
from shared.checkpoint.integers import as_parts
from shared.model_files import ModelFiles, find_weights
from shared.models.loading import load_weights
from shared.policies.table import architecture_of
from tests.shared.test_model_store import sharded
from tests.tiny_models import tiny_model


def files_in(folder: Path) -> ModelFiles:
    return ModelFiles("tiny", folder, find_weights(folder), "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "tiny"))


def test_whole_and_sharded(model: Path) -> None:
    expected = load_file(model / "model.safetensors")
    for _ in range(2):
        checkpoint = open_checkpoint(files_in(model))
        assert checkpoint.names() == set(expected)
        assert all(torch.equal(checkpoint.tensor(name), value) for name, value in expected.items())
        if (model / "model.safetensors").exists():
            sharded(model)
    with pytest.raises(KeyError):
        checkpoint.tensor("model.nothing")


def test_an_index_that_names_what_no_shard_holds(model: Path) -> None:
    sharded(model)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors lacks model\.extra"):
        open_checkpoint(files_in(model))


def test_a_file_that_is_cut_short_names_the_tensor_it_ends_in(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"first": torch.zeros(100), "second": torch.zeros(100), "third": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for lost, name in ((1, "third"), (401, "second"), (801, "first")):
        path.write_bytes(whole[:-lost])
        with pytest.raises(CheckpointError, match=rf"cut\.safetensors is not .*cut short, \d+ bytes, in {name}"):
            SafetensorsCheckpoint((path,))
    for kept in (0, 7, 8, 50):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a whole .* ends in its header"):
            SafetensorsCheckpoint((path,))
    path.write_bytes(b"\x02" + bytes(7) + b"[]" + bytes(100))
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a whole safetensors file"):
        SafetensorsCheckpoint((path,))


def test_a_parameter_in_two_files(tmp_path: Path) -> None:
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for path in paths:
        save_file({"tied": torch.arange(4.0), path.stem: torch.zeros(1)}, path)
    assert SafetensorsCheckpoint(paths).names() == {"tied", "a", "b"}
    save_file({"tied": torch.zeros(4)}, paths[1])
    with pytest.raises(CheckpointError, match=r"tied is one thing in .*a\.safetensors and another in .*b\.safetensors"):
        SafetensorsCheckpoint(paths)


def test_integers_are_stored_and_read_as_such(tmp_path: Path) -> None:
    with_offset = Integers(4, torch.randint(-8, 8, (6, 32), dtype=torch.int8), torch.rand(6, 2), torch.rand(6, 2))
    rows = Integers(8, torch.randint(-128, 128, (4, 16), dtype=torch.int8), torch.rand(4, 1))
    fp8 = Integers(8, torch.randint(-128, -1, (4, 16), dtype=torch.int8), torch.rand(4, 2), floating=True)
    fp6 = Integers(6, torch.randint(0, 64, (4, 16), dtype=torch.int8), torch.rand(4, 1), floating=True)
    all_forms = {"grouped": with_offset, "rows": rows, "fp8": fp8, "fp6": fp6}
    tensors, table = as_parts({**all_forms, "plain": torch.ones(3)})
    assert table == {"grouped": 4, "rows": 8, "fp8": "fp8", "fp6": "fp6"}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"integers": json.dumps(table)})
    checkpoint = SafetensorsCheckpoint((path,))
    assert checkpoint.names() == {*all_forms, "plain"}
    assert checkpoint.integers("plain") is None
    for name, expected in all_forms.items():
        found = checkpoint.integers(name)
        assert found is not None
        assert found.quantization == expected.quantization
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.scale, expected.scale)
    assert torch.equal(checkpoint.tensor("fp8")[:, 8:], floats_of(fp8.values, "fp8")[:, 8:] * fp8.scale[:, 1:])
    assert torch.equal(checkpoint.tensor("fp6"), floats_of(fp6.values, "fp6") * fp6.scale)
    assert torch.equal(checkpoint.tensor("rows"), rows.values * rows.scale)
    first = with_offset.values[0, 16:].float() * with_offset.scale[0, 1] + with_offset.offset[0, 1]  # type: ignore[index]
    assert torch.equal(checkpoint.tensor("grouped")[0, 16:], first)


def all_integers(path: Path) -> list[Integers | None]:
    checkpoint = SafetensorsCheckpoint((path,))
    return [checkpoint.integers(name) for name in sorted(checkpoint.names())]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("[]", "its table of integers is not a JSON object"),
        ('{"w": 3}', "w has integers of 3 bits"),
        ('{"w": true}', "w has integers of True bits"),
        ('{"v": 8}', r"lacks v$"),
        ('{"plain": 8}', r"lacks plain\.scale"),
        ('{"w": 4}', "not all of its integers have 4 bits"),
        ('{"f": 8}', "values must be int8"),
        ('{"w": "fp5"}', "w has integers of 'fp5' bits; 8, 4, fp8 and fp6 are read"),
        ('{"nan": "fp8"}', "nan in .*: not all of its numbers are fp8"),
        ('{"nan": "fp6"}', "nan in .*: not all of its numbers are fp6"),
        ('{"endless": 8}', r"endless\.scale in .*: not all of it is finite"),
        ('{"endless": "fp6"}', r"endless\.scale in .*: not all of it is finite"),
        ('{"shifted": "fp8"}', "shifted in .*: floats are symmetric: they have no offset"),
        ('{"shifted": 8}', r"shifted\.offset in .*: not all of it is finite"),
    ],
)
def test_a_table_of_integers_that_cannot_be(table: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = {"w": torch.full((2, 8), 9, dtype=torch.int8), "w.scale": torch.ones(2, 1), "plain": torch.ones(2)}
    weight |= {"f": torch.ones(2, 8), "f.scale": torch.ones(2, 1)}
    weight |= {"nan": torch.full((2, 8), 127, dtype=torch.int8), "nan.scale": torch.ones(2, 1)}
    weight |= {"endless": weight["w"].clone(), "endless.scale": torch.tensor([[1.0], [torch.inf]])}
    weight |= {"shifted": weight["w"].clone(), "shifted.scale": torch.ones(2, 1)}
    weight |= {"shifted.offset": torch.tensor([[1.0], [torch.nan]])}
    save_file(weight, path, metadata={"integers": table})
    with pytest.raises(CheckpointError, match=reason) as raised:
        all_integers(path)
    assert str(path) in str(raised.value)


def test_a_shape_that_the_config_does_not_say_names_parameter_and_file(model: Path) -> None:
    path, name = model / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:, :-1].clone()}, path)
    files = files_in(model)
    with pytest.raises(CheckpointError, match=rf"{name}: rows and columns \[64, 95\] in {path}, but config\.json says"):
        load_weights(architecture_of(files.config), open_checkpoint(files), dtype=torch.float32, device="cpu")
