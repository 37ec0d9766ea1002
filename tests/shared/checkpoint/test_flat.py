"""One buffer with a table: mapped again as it was, and refused where the table cannot be."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kernels.quantization import Integers
from shared.checkpoint import CheckpointError, FlatCheckpoint, open_any, save_flat
from shared.models.loading import load_weights
from shared.models.weights import ModelWeights
from shared.policies.table import architecture_of
from tests.shared.checkpoint.test_safetensors import files_in
from tests.tiny_models import tiny_model

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "float": torch.randn(3, 5),
    "half": torch.randn(4).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "small": torch.randn(9).to(torch.float8_e4m3fn),
    "turned": torch.randn(3, 5).T,
    "integers": torch.arange(-3, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_flat(tmp_path, TENSORS)
    return tmp_path


def table_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "flat.json").read_text())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def test_every_tensor_comes_back(folder: Path) -> None:
    for source in (folder, folder / "flat.json"):
        checkpoint = open_any(source)
        assert checkpoint.names() == set(TENSORS)
        for name, value in TENSORS.items():
            found = checkpoint.tensor(name)
            assert found.shape == value.shape
            assert same(found, value), name
            assert checkpoint.integers(name) is None
    with pytest.raises(KeyError):
        checkpoint.tensor("nothing")


def test_tensors_are_aligned_and_mapped(folder: Path) -> None:
    checkpoint = FlatCheckpoint(folder)
    assert str(folder / "flat.bin") in Path("/proc/self/maps").read_text()
    pointers = [checkpoint.tensor(name).data_ptr() for name, value in TENSORS.items() if value.numel()]
    assert all(pointer % 256 == 0 for pointer in pointers)
    assert len({checkpoint.tensor(name).untyped_storage().data_ptr() for name in ("float", "bytes", "turned")}) == 1
    checkpoint.tensor("float").zero_()
    assert same(FlatCheckpoint(folder).tensor("float"), TENSORS["float"]), "nobody writes to the file"


def test_integers_come_back_as_such(tmp_path: Path) -> None:
    weight = Integers(4, torch.randint(-8, 8, (6, 32), dtype=torch.int8), torch.rand(6, 2), torch.rand(6, 2))
    save_flat(tmp_path, {"w": weight, "b": torch.ones(6)})
    checkpoint = FlatCheckpoint(tmp_path)
    assert checkpoint.names() == {"w", "b"}
    found = checkpoint.integers("w")
    assert found is not None
    assert found.bits == 4
    assert found.offset is not None
    assert torch.equal(found.values, weight.values)
    assert torch.equal(found.offset, weight.offset)  # type: ignore[arg-type]
    assert checkpoint.tensor("w").shape == (6, 32)


def test_a_decoder_of_packed_weights_is_mapped_again(tmp_path: Path) -> None:
    """The flattened model of a fast reload: nothing is packed a second time."""
    files = files_in(tiny_model("llama"))
    architecture = architecture_of(files.config)
    packed = load_weights(architecture, open_any(files.folder), dtype=torch.bfloat16, device="cpu").tensors()
    save_flat(tmp_path, packed)
    flat = FlatCheckpoint(tmp_path)
    again = ModelWeights.from_tensors(architecture, {name: flat.tensor(name) for name in flat.names()}).tensors()
    assert again.keys() == packed.keys()
    assert all(same(again[name], packed[name]) for name in packed)


def test_a_whole_model_and_a_rank_of_it(tmp_path: Path) -> None:
    whole = load_file(tiny_model("llama") / "model.safetensors")
    save_flat(tmp_path, whole)
    assert all(torch.equal(open_any(tmp_path).tensor(name), value) for name, value in whole.items())
    (tmp_path / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    half = open_any(tmp_path, rank=1, ranks=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(half.tensor(name), whole[name].chunk(2)[1])


def test_a_buffer_that_is_cut_short_names_the_tensor(folder: Path) -> None:
    buffer = folder / "flat.bin"
    whole = buffer.read_bytes()
    for lost, name in ((1, "integers"), (300, "turned"), (len(whole), "bytes")):
        buffer.write_bytes(whole[: len(whole) - lost])
        with pytest.raises(CheckpointError, match=rf"{name} lies beyond the end of .*flat\.bin: at \d+, \d+ bytes"):
            FlatCheckpoint(folder)
    buffer.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=r"flat\.bin has \d+ bytes, but .*flat\.json says \d+"):
        FlatCheckpoint(folder)
    buffer.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*flat\.bin"):
        FlatCheckpoint(folder)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "float4"}, "float has dtype 'float4'"),
        ({"dtype": ["float32"]}, r"float has dtype \['float32'\]"),
        ({"shape": "3"}, "float has shape 3"),
        ({"shape": [3, -1]}, r"float has shape \[3, -1\]"),
        ({"shape": [3, True]}, r"float has shape \[3, True\]"),
        ({"shape": [3.0]}, r"float has shape \[3\.0\]"),
        ({"shape": [1] * 17}, "float has shape"),
        ({"shape": [1 << 63]}, "float has shape"),
        ({"shape": [1 << 40, 1 << 40]}, "float has shape .*more than any file holds"),
        ({"shape": [0, 1 << 62, 4]}, "float has shape .*more than any file holds"),
        ({"shape": [1 << 62]}, r"float lies beyond the end of .*flat\.bin"),
        ({"shape": [1 << 20]}, r"float lies beyond the end of .*flat\.bin"),
        ({"shape": [70]}, "float and half lie over each other"),
        ({"offset": 0}, "bytes and float lie over each other"),
        ({"offset": 1}, "float has offset 1, which must be a multiple of 256"),
        ({"offset": -256}, "float has offset -256"),
        ({"offset": None}, "float has offset None"),
        ({"offset": 256 << 60}, "float has offset"),
        ({"offset": 256 << 40}, r"float lies beyond the end of .*flat\.bin"),
        ({"name": 3}, "is no tensor"),
        ({"name": "empty"}, "empty is there twice"),
    ],
)
def test_entries_that_cannot_be(entry: dict[str, object], reason: str, folder: Path) -> None:
    table = table_of(folder)
    tensors = table["tensors"]
    assert isinstance(tensors, list)
    tensors[1] |= entry
    (folder / "flat.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=reason):
        FlatCheckpoint(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "flat"}, "is no table of a flat checkpoint: format 'flat'"),
        ({"tensors": {}}, "has no list of tensors"),
        ({"tensors": [3]}, "'3' is no tensor"),
        ({"num_bytes": "3"}, "but .* says '3'"),
        ({"integers": []}, "the table of integers is no JSON object"),
        ({"integers": {"float": 8}}, r"lacks float\.scale"),
        ({"integers": {"nothing": 8}}, "lacks nothing"),
    ],
)
def test_tables_that_cannot_be(change: dict[str, object], reason: str, folder: Path) -> None:
    (folder / "flat.json").write_text(json.dumps(table_of(folder) | change))
    with pytest.raises(CheckpointError, match=reason):
        FlatCheckpoint(folder)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    save_flat(folder, TENSORS)
    (folder / "original.json").write_text((folder / "flat.json").read_text())
    return folder


NUMBERS = st.one_of(st.integers(-2, 600), st.sampled_from([1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 64]))


ENTRIES = st.fixed_dictionaries(
    {
        "shape": st.lists(NUMBERS, max_size=4),
        "offset": NUMBERS,
        "dtype": st.sampled_from(["uint8", "float64", "x"]),
    }
)


def sizes_read(folder: Path) -> list[int]:
    """Bytes of each tensor, or none of a table that is refused by name."""
    try:
        checkpoint = FlatCheckpoint(folder)
    except CheckpointError as error:
        return [] if str(folder) in str(error) else [1 << 62]
    return [checkpoint.tensor(name).nbytes for name in checkpoint.names()]


@settings(max_examples=100, deadline=None)
@given(index=st.integers(0, len(TENSORS) - 1), entry=ENTRIES)
def test_a_table_is_refused_or_read_inside_its_buffer(
    shared_folder: Path, index: int, entry: dict[str, object]
) -> None:
    table = json.loads((shared_folder / "original.json").read_text())
    table["tensors"][index] |= entry
    (shared_folder / "flat.json").write_text(json.dumps(table))
    assert max(sizes_read(shared_folder), default=0) <= table["num_bytes"]


def test_what_has_no_name_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex is complex64"):
        save_flat(tmp_path, {"complex": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
