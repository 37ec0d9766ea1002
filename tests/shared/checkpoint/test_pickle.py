"""Files of torch.save, harmless and otherwise."""

import argparse
import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.checkpoint import CheckpointError, PickleCheckpoint, UnsupportedCheckpointError, open_any, open_checkpoint
from shared.model_files import ModelFiles, Weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


class Malicious:
    """Pickled as a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def assert_is_state(checkpoint: PickleCheckpoint) -> None:
    assert checkpoint.names() == set(STATE)
    for name, value in STATE.items():
        assert torch.equal(checkpoint.tensor(name), value)
        assert checkpoint.tensor(name).dtype == value.dtype
        assert checkpoint.integers(name) is None


def test_pickle_by_flag_alone(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(STATE, path)
    files = ModelFiles("x", tmp_path, Weights("pickle", (path,)), "")
    listed = {"type": "ds_model", "checkpoints": [path.name], "version": 1.0, "base_dir": str(tmp_path)}
    for refused in (lambda: open_checkpoint(files), lambda: open_any(path), lambda: open_any(listed)):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickle.*--allow-pickle"):
            refused()
    for checkpoint in (open_checkpoint(files, allow_pickle=True), open_any(path, allow_pickle=True)):
        assert isinstance(checkpoint, PickleCheckpoint)
        assert_is_state(checkpoint)


@pytest.mark.parametrize("place", ["value", "nested", "key", "beside", "whole"])
def test_a_malicious_pickle_is_not_executed(place: str, tmp_path: Path) -> None:
    bomb = Malicious(tmp_path / "ran")
    contents = {
        "value": {**STATE, "x": bomb},
        "nested": {"module": {"a": {"b": [bomb]}}},
        "key": {"module": STATE, "args": bomb},
        "beside": {"module": STATE, "optimizer": {"state": {0: bomb}}},
        "whole": bomb,
    }[place]
    path = tmp_path / "model.pt"
    for is_archive in (True, False):
        torch.save(contents, path, _use_new_zipfile_serialization=is_archive)
        with pytest.raises(CheckpointError, match=r"model\.pt is not a plain torch checkpoint: it holds posix.mkdir"):
            open_any(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match=r"model\.pt is not a plain torch checkpoint"):
        open_any(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "ran").exists(), "it would have run, had anybody unpickled it"


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"module": STATE, "args": argparse.Namespace(layers=2)}, path)
    with pytest.raises(CheckpointError) as raised:
        PickleCheckpoint((path,))
    assert str(raised.value) == (
        f"{path} is not a plain torch checkpoint: it holds argparse.Namespace, which is no tensor and is not unpickled"
    )


@pytest.mark.parametrize(
    "contents",
    [
        STATE,
        collections.OrderedDict(STATE),
        {name: nn.Parameter(value) for name, value in STATE.items()},
        {"module": STATE, "dp_world_size": 1, "ds_config": {"a": [1, "b", None]}},
        {"model": STATE, "iteration": 7},
    ],
)
def test_forms_of_a_state_dict(contents: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for is_archive in (True, False):
        torch.save(contents, path, _use_new_zipfile_serialization=is_archive)
        assert_is_state(PickleCheckpoint((path,)))


def test_several_files_are_one_model(tmp_path: Path) -> None:
    paths = (tmp_path / "1.bin", tmp_path / "2.bin")
    for path, names in zip(paths, (["a.weight", "a.bias"], ["a.bias"]), strict=True):
        torch.save({name: STATE[name] for name in names}, path)
    assert_is_state(PickleCheckpoint(paths))
    torch.save({"a.bias": torch.zeros(2)}, paths[1])
    with pytest.raises(CheckpointError, match=r"a\.bias is one thing in .*1\.bin and another in .*2\.bin"):
        PickleCheckpoint(paths)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([1, 2], "dictionary of tensors$"),
        ({"a": 1}, "dictionary of tensors: 'a' is int"),
        ({1: torch.zeros(1)}, "dictionary of tensors: 1 is Tensor"),
        ({"a": [torch.zeros(1)] * 3}, "dictionary of tensors: 'a' is list"),
        ({"a": torch.eye(2).to_sparse()}, "a in .* is no plain tensor"),
        ({"a": [torch.zeros(4, 2, dtype=torch.int8), torch.ones(3)]}, r"a in .*scales \[3\] do not fit int8 \[4, 2\]"),
    ],
)
def test_what_is_no_state_dict(contents: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=reason) as raised:
        PickleCheckpoint((path,))
    assert str(path) in str(raised.value)


def test_both_and_neither(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"module": STATE, "model": STATE}, path)
    with pytest.raises(UnsupportedCheckpointError, match="checkpoint has both 'model' and 'module' keys"):
        PickleCheckpoint((path,))
    torch.save({"model": STATE, "module": 3}, path)
    with pytest.raises(AssertionError, match="checkpoint has both 'model' and 'module' keys, not sure how to proceed"):
        PickleCheckpoint((path,))


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for is_archive in (True, False):
        torch.save(STATE, path, _use_new_zipfile_serialization=is_archive)
        whole = path.read_bytes()
        for kept in (0, 1, 40, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:kept])
            with pytest.raises(CheckpointError, match=r"model\.pt is not a plain torch checkpoint: "):
                PickleCheckpoint((path,))


def test_no_file_is_larger_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"bomb": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(CheckpointError, match=r"bomb claims to be \[1000000, 1000000\], more than its .*model\.pt"):
        PickleCheckpoint((path,))
    torch.save(STATE, path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match=r"packed\.pt is not a plain torch checkpoint: .* is compressed"):
        PickleCheckpoint((packed,))


def test_storages_that_a_file_does_not_hold(tmp_path: Path) -> None:
    """The pickle of one model with the numbers of a smaller one."""
    large, small = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(10_000)}, large)
    torch.save({"w": torch.ones(10)}, small)
    path = tmp_path / "mixed.pt"
    with zipfile.ZipFile(large) as one, zipfile.ZipFile(small) as other, zipfile.ZipFile(path, "w") as mixed:
        for name in other.namelist():
            mixed.writestr(name, (one if name.endswith("data.pkl") else other).read(name))
    with pytest.raises(CheckpointError, match=r"mixed\.pt"):
        PickleCheckpoint((path,))


def test_tensors_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1 << 20)}, path)
    checkpoint = PickleCheckpoint((path,))
    maps = Path("/proc/self/maps").read_text()
    assert str(path) in maps
    assert torch.equal(checkpoint.tensor("w"), torch.ones(1 << 20))
